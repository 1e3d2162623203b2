// What every load and store has in common, and the device addresses they go to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace clce::executor {

constexpr unsigned char kPoison = 0xff;  // fresh memory: NaN in every floating-point type

// Device addresses: reserved and never accessible, so that whoever dereferences one, host code included,
// gets a segmentation fault.
class AddressRange {
 public:
  static constexpr size_t kAlignment = size_t(1) << 20;  // of its base

  explicit AddressRange(size_t bytes);

  uintptr_t base() const { return base_; }
  bool contains(uintptr_t address) const { return address >= base_ && address < base_ + bytes_; }

 private:
  uintptr_t base_;
  size_t bytes_;
};

struct Access {
  uintptr_t address;
  size_t bytes;
  size_t alignment;
  const char* what;  // "load", "store" and so on, for messages

  Access(const void* address, size_t bytes, size_t alignment, const char* what)
      : address(reinterpret_cast<uintptr_t>(address)), bytes(bytes), alignment(alignment), what(what) {}

  bool is_aligned() const { return (address & (alignment - 1)) == 0; }
  // "load of 4 bytes at "
  std::string text() const { return std::string(what) + " of " + std::to_string(bytes) + " bytes at "; }
};

std::string hex(uintptr_t address);  // 0x...

// Calls f(bytes); the usual sizes as constants, for which the compiler unrolls f's loops.
template <class F>
inline void with_size(size_t bytes, F f) {
  switch (bytes) {
    case 4:
      return f(std::integral_constant<size_t, 4>());
    case 8:
      return f(std::integral_constant<size_t, 8>());
    case 16:
      return f(std::integral_constant<size_t, 16>());
    default:
      return f(bytes);
  }
}

}  // namespace clce::executor
