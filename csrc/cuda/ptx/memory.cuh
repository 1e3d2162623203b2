// Ordinary loads and stores. They are functions so that an executor can check every one of them.
#pragma once

#include <cstdint>

namespace clce::ptx {

// The block's dynamic shared memory; kernels use no other.
CLCE_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char clce_dynamic_shared[];
  return clce_dynamic_shared;
}

template <class T>
CLCE_DEVICE T shared_load(const T* address) {
  return *address;
}

template <class T>
CLCE_DEVICE void shared_store(T* address, T value) {
  *address = value;
}

template <class T>
CLCE_DEVICE T global_load(const T* address) {
  return *address;
}

template <class T>
CLCE_DEVICE void global_store(T* address, T value) {
  *address = value;
}

// Writes before it are seen by the whole device before writes after it.
CLCE_DEVICE void fence_device() {
  __threadfence();
}

// Adds to global memory and returns what was there.
CLCE_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return atomicAdd(address, value);
}

}  // namespace clce::ptx
