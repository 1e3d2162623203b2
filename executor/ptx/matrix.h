// Matrices that the lanes of a warp load and multiply together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/ptx/types.cuh"
#include "executor/machine.h"
#include "executor/ptx/arithmetic.h"
#include "executor/ptx/warp.h"

namespace clce::ptx {

// ldmatrix: lanes 8 i .. 8 i + 7 give the addresses of matrix i's rows of 8 elements of 2 bytes. Lane l
// receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.

namespace host {
template <bool Transposed>
void ldmatrix_x4(const executor::Operation& at, uint32_t (&registers)[4], const void* row) {
  collective(
      at,
      [](const void* const* in, void* const* out) {
        auto& machine = executor::machine();
        executor::Launch& launch = machine.launches.back();
        for (int m = 0; m < 4; ++m) {
          const void* const* rows = in + 8 * m;
          uint16_t matrix[8][8];
          uintptr_t addresses[8];
          for (int r = 0; r < 8; ++r) {
            machine.shared.read(executor::lanes()[8 * m + r], executor::Access(rows[r], 16, 16, "ldmatrix"),
                                matrix[r]);
            addresses[r] = reinterpret_cast<uintptr_t>(rows[r]);
          }
          ++launch.ldmatrix;
          launch.ldmatrix_conflicts += executor::bank_conflicts(addresses, 8, 16);
          for (int lane = 0; lane < executor::kWarpLanes; ++lane) {
            const int r = lane / 4, c = lane % 4 * 2;
            const uint32_t low = Transposed ? matrix[c][r] : matrix[r][c];
            const uint32_t high = Transposed ? matrix[c + 1][r] : matrix[r][c + 1];
            static_cast<uint32_t*>(out[lane])[m] = low | high << 16;
          }
        }
      },
      row, registers);
}
}  // namespace host

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, CallSite site = CallSite::here()) {
  host::ldmatrix_x4<false>({"ldmatrix_x4", site}, r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CallSite site = CallSite::here()) {
  host::ldmatrix_x4<true>({"ldmatrix_x4_trans", site}, r, row);
}

// mma: d += a b. Products are exact.

namespace host {
struct MmaIn {
  const uint32_t* a;
  const uint32_t* b;
};

// Toward zero.
inline float truncate(double x) {
  const float nearest = static_cast<float>(x);
  return std::abs(double(nearest)) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// d + a b, as an A100's tensor core sums up some columns: every term is cut off one bit below the last place
// of the largest one, and so is the result below its own (Fasi, Higham, Mikaitis, Pranesh: "Numerical
// behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021).
inline float add_truncated(float d, const float* a, const float* b, int columns) {
  double largest = std::abs(d), sum = d;
  for (int k = 0; k < columns; ++k) {
    const double term = double(a[k]) * b[k];
    largest = std::max(largest, std::abs(term));
    sum += term;
  }
  if (largest == 0 || !std::isfinite(sum)) return static_cast<float>(sum);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24), per_unit = 1 / unit;
  double units = std::trunc(d * per_unit);
  for (int k = 0; k < columns; ++k) units += std::trunc(double(a[k]) * b[k] * per_unit);
  return truncate(units * unit);
}

template <int K>
void multiply(const float (&a)[16][K], const float (&b)[8][K], void* const* out) {
  constexpr int kPart = K / 2;  // columns that are summed up at once
  const bool coarse = executor::machine().arithmetic == executor::Arithmetic::kCoarse;
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      float& d = static_cast<float*>(out[row % 8 * 4 + col / 2])[row / 8 * 2 + col % 2];
      if (coarse) {
        for (int k = K - kPart; k >= 0; k -= kPart) d = add_truncated(d, a[row] + k, b[col] + k, kPart);
        continue;
      }
      double sum = d;
      for (int k = 0; k < K; ++k) sum += double(a[row][k]) * b[col][k];
      d = static_cast<float>(sum);
    }
  }
}

template <class Tag>
void mma_m16n8k16(const void* const* in, void* const* out) {
  float a[16][16], b[8][16];  // b by columns
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    const MmaIn& operand = *static_cast<const MmaIn*>(in[lane]);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][thread * 2 + half + i / 2 * 8] =
            widen(Tag{}, uint16_t(operand.a[i] >> 16 * half));
      }
      for (int i = 0; i < 2; ++i) {
        b[group][thread * 2 + half + i * 8] = widen(Tag{}, uint16_t(operand.b[i] >> 16 * half));
      }
    }
  }
  multiply(a, b, out);
  ++executor::machine().launches.back().mma;
}

inline void mma_m16n8k8_tf32(const void* const* in, void* const* out) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    const MmaIn& operand = *static_cast<const MmaIn*>(in[lane]);
    // The tensor core looks at the upper 19 bits only.
    for (int i = 0; i < 4; ++i) {
      a[group + i % 2 * 8][thread + i / 2 * 4] = bits_float(operand.a[i] & 0xffffe000u);
    }
    for (int i = 0; i < 2; ++i) b[group][thread + i * 4] = bits_float(operand.b[i] & 0xffffe000u);
  }
  multiply(a, b, out);
  ++executor::machine().launches.back().mma;
}
}  // namespace host

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16_tag,
                         CallSite site = CallSite::here()) {
  const host::MmaIn in{a, b};
  host::collective({"mma_m16n8k16 bf16", site}, host::mma_m16n8k16<bf16_tag>, &in, d);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16_tag,
                         CallSite site = CallSite::here()) {
  const host::MmaIn in{a, b};
  host::collective({"mma_m16n8k16 f16", site}, host::mma_m16n8k16<f16_tag>, &in, d);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             CallSite site = CallSite::here()) {
  const host::MmaIn in{a, b};
  host::collective({"mma_m16n8k8_tf32", site}, host::mma_m16n8k8_tf32, &in, d);
}

}  // namespace clce::ptx
