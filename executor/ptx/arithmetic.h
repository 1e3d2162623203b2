// Number formats, and the one approximate function the kernels use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/ptx/types.cuh"
#include "executor/machine.h"

namespace clce::ptx {

namespace host {
inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(bf16_tag, uint16_t bits) {
  return bits_float(uint32_t(bits) << 16);
}
inline float widen(f16_tag, uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  if ((bits & 0x7c00) == 0x7c00) return bits_float(sign | 0x7f800000u | uint32_t(bits & 0x3ff) << 13);
  // The exponent's bias is put right by a multiplication, which is exact for subnormals too.
  return bits_float(float_bits(bits_float(uint32_t(bits & 0x7fff) << 13) * 0x1p112f) | sign);
}
inline uint16_t narrow(bf16_tag, float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // a NaN stays one
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t narrow(f16_tag, float value) {
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, rounded by an addition
    return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f)));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
}  // namespace host

inline float to_float(bf16 x) {
  return host::widen(bf16_tag{}, x.bits);
}
inline float to_float(f16 x) {
  return host::widen(f16_tag{}, x.bits);
}
inline float to_float(float x) {
  return x;
}
inline bf16 to_bf16(float x) {
  return {host::narrow(bf16_tag{}, x)};
}
inline f16 to_f16(float x) {
  return {host::narrow(f16_tag{}, x)};
}
inline uint32_t pack_bf16x2(float low, float high) {
  return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16;
}
inline uint32_t pack_f16x2(float low, float high) {
  return to_f16(low).bits | uint32_t(to_f16(high).bits) << 16;
}

// cvt.rna.tf32: 10 bits of mantissa, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = host::float_bits(x);
  if (std::isnan(x)) return 0x7fffe000u;
  if (std::isinf(x)) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

namespace host {
// Up to 2 ulp away, as ex2.approx may be: each x has its own error. Not beyond a power of two, where an ulp
// is twice as much; above one, by one. 2^0 is 1, and an x that is not normal counts as 0.
inline float disturb(float x, float y) {
  if (std::abs(x) < 0x1p-126f || !std::isfinite(y) || y < 0x1p-126f) return y;
  const uint32_t bits = float_bits(y);
  const int fraction = static_cast<int>(bits & 0x7fffffu);
  const int ulps = static_cast<int>((float_bits(x) * 0x9e3779b1u >> 16) % 5) - 2;
  return bits_float(bits + uint32_t(std::min(ulps, fraction == 0 ? 1 : 0x800000 - fraction)));
}
}  // namespace host

inline float exp2_fast(float x) {
  float y = static_cast<float>(std::exp2(double(x)));
  if (executor::machine().arithmetic == executor::Arithmetic::kCoarse) y = host::disturb(x, y);
  return y < 0x1p-126f ? 0.0f : y;
}
inline uint32_t opaque(uint32_t x) {
  return x;
}

}  // namespace clce::ptx
