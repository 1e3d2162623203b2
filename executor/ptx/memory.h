// Loads and stores: each is checked by the memory it goes to.
#pragma once

#include <cstddef>
#include <cstdint>

#include "executor/machine.h"

namespace clce::ptx {

using executor::CallSite;

namespace host {

// Vectors need the alignment of their whole size, as ld.v2 and ld.v4 do.
template <class T>
constexpr size_t alignment = (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16 ? sizeof(T) : alignof(T);

// For bank conflicts. What is larger than its alignment is accessed in pieces, one after the other.
template <class T>
void count(const executor::Operation& at, const T* address) {
  executor::Machine& machine = executor::machine();
  if (!machine.banks.is_counting()) return;
  for (size_t offset = 0; offset < sizeof(T); offset += alignment<T>) {
    machine.banks.add(executor::thread(), at, reinterpret_cast<const char*>(address) + offset, alignment<T>);
  }
}

template <class T, class Memory>
T load(Memory& memory, const T* address) {
  T value;
  memory.read(executor::thread(), executor::Access(address, sizeof(T), alignment<T>, "load"), &value);
  return value;
}
template <class T, class Memory>
void store(Memory& memory, T* address, const T& value) {
  memory.write(executor::thread(), executor::Access(address, sizeof(T), alignment<T>, "store"), &value);
}

}  // namespace host

inline unsigned char* dynamic_shared() {
  return static_cast<unsigned char*>(executor::machine().shared.base());
}

template <class T>
T shared_load(const T* address, CallSite site = CallSite::here()) {
  host::count({"shared_load", site}, address);
  return host::load(executor::machine().shared, address);
}
template <class T>
void shared_store(T* address, T value, CallSite site = CallSite::here()) {
  host::count({"shared_store", site}, address);
  host::store(executor::machine().shared, address, value);
}
template <class T>
T global_load(const T* address) {
  return host::load(executor::machine().global, address);
}
template <class T>
void global_store(T* address, T value) {
  host::store(executor::machine().global, address, value);
}

inline void fence_device() {
  executor::machine().clocks.fence(executor::thread());
}
inline uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return executor::machine().global.atomic_add(executor::thread(), address, value);
}

}  // namespace clce::ptx
