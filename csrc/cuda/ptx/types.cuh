// The 16-bit element types as plain bits, so that neither kernels nor hosts need a vendor header.
#pragma once

#include <cstdint>

namespace clce::ptx {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Which 16-bit type the packed operands of an mma hold.
struct bf16_tag {};
struct f16_tag {};

// Two numbers that move as one.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// 16 bytes that move as one.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

}  // namespace clce::ptx
