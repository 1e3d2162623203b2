// The primitives of csrc/cuda/ptx on the executor. Meaning and fragment layouts are those of the PTX ISA
// manual (sections "mma.m16n8k16", "mma.m16n8k8", "ldmatrix", "cp.async", "shfl.sync", "barrier").
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/ptx/types.cuh"
#include "executor/executor.h"

#define CLCE_KERNEL
#define CLCE_LAUNCH_BOUNDS(threads, blocks)
#define CLCE_DEVICE inline

#define threadIdx (::clce::executor::thread_index())
#define blockIdx (::clce::executor::block_index())
#define blockDim (::clce::executor::block_dim())
#define gridDim (::clce::executor::grid_dim())
using dim3 = clce::executor::Dim3;

namespace clce::ptx {

// Memory

// Vectors need the alignment of their whole size, as ld.v2 and ld.v4 do.
template <class T>
constexpr size_t access_alignment =
    (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16 ? sizeof(T) : alignof(T);

inline unsigned char* dynamic_shared() {
  return executor::dynamic_shared();
}

template <class T>
T shared_load(const T* address) {
  T value;
  executor::shared_read(address, &value, sizeof(T), access_alignment<T>);
  return value;
}
template <class T>
void shared_store(T* address, T value) {
  executor::shared_write(address, &value, sizeof(T), access_alignment<T>);
}
template <class T>
T global_load(const T* address) {
  T value;
  executor::global_read(address, &value, sizeof(T), access_alignment<T>);
  return value;
}
template <class T>
void global_store(T* address, T value) {
  executor::global_write(address, &value, sizeof(T), access_alignment<T>);
}

template <int Bytes>
void cp_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  executor::async_copy(shared, global, Bytes, valid);
}
inline void cp_async_commit() {
  executor::async_commit();
}
template <int Groups>
void cp_async_wait() {
  executor::async_wait(Groups);
}

inline void fence_device() {
  executor::fence_device();
}
inline uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return executor::atomic_add(address, value);
}

// Barriers

inline void sync_threads() {
  executor::barrier(0, -1, "sync_threads");
}
inline void named_barrier_sync(int id, int threads) {
  executor::barrier(id, threads, "named_barrier_sync");
}
inline void sync_warp() {
  executor::warp_collective(
      "sync_warp", [](const void* const*, void* const*) { executor::warp_joined(); }, nullptr, nullptr);
}

// Shuffles and votes: values only, no ordering of memory accesses

namespace host {
template <class T>
struct Shuffle {
  T value;
  int argument;
};

template <class T, class Source>
T shuffle(const char* what, T value, int argument, Source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  const Shuffle<T> in{value, argument};
  T out;
  executor::warp_collective(
      what,
      [](const void* const* in, void* const* out) {
        for (int lane = 0; lane < 32; ++lane) {
          const int source = Source{}(lane, static_cast<const Shuffle<T>*>(in[lane])->argument);
          *static_cast<T*>(out[lane]) =
              static_cast<const Shuffle<T>*>(in[source >= 0 && source < 32 ? source : lane])->value;
        }
      },
      &in, &out);
  return out;
}

struct SourceXor {
  int operator()(int lane, int mask) const { return lane ^ mask; }
};
struct SourceDown {
  int operator()(int lane, int delta) const { return lane + delta; }
};
struct SourceLane {
  int operator()(int, int source) const { return source & 31; }
};
}  // namespace host

template <class T>
T shuffle_xor(T value, int lane_mask) {
  return host::shuffle("shuffle_xor", value, lane_mask, host::SourceXor{});
}
template <class T>
T shuffle_down(T value, int delta) {
  return host::shuffle("shuffle_down", value, delta, host::SourceDown{});
}
template <class T>
T shuffle(T value, int source_lane) {
  return host::shuffle("shuffle", value, source_lane, host::SourceLane{});
}

inline uint32_t ballot(bool predicate) {
  uint32_t votes;
  executor::warp_collective(
      "ballot",
      [](const void* const* in, void* const* out) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane) votes |= uint32_t(*static_cast<const bool*>(in[lane])) << lane;
        for (int lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(out[lane]) = votes;
      },
      &predicate, &votes);
  return votes;
}
inline bool any_sync(bool predicate) {
  return ballot(predicate) != 0;
}

// ldmatrix: lanes 8 i .. 8 i + 7 give the addresses of matrix i's rows of 8 elements of 2 bytes. Lane l
// receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.

namespace host {
template <int Matrices, bool Transposed>
void ldmatrix(const char* what, uint32_t* registers, const void* row) {
  executor::warp_collective(
      what,
      [](const void* const* in, void* const* out) {
        for (int m = 0; m < Matrices; ++m) {
          uint16_t matrix[8][8];
          for (int r = 0; r < 8; ++r) executor::read_matrix_row(8 * m + r, in[8 * m + r], matrix[r]);
          executor::count_ldmatrix(in + 8 * m);
          for (int lane = 0; lane < 32; ++lane) {
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

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  host::ldmatrix<4, false>("ldmatrix_x4", r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  host::ldmatrix<2, false>("ldmatrix_x2", r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  host::ldmatrix<4, true>("ldmatrix_x4_trans", r, row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  host::ldmatrix<2, true>("ldmatrix_x2_trans", r, row);
}

// Number formats

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

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline uint32_t opaque(uint32_t x) {
  return x;
}
inline int population_count(uint32_t bits) {
  return __builtin_popcount(bits);
}

// mma: d += a b. Products are exact; each element's sum is rounded once, in no particular order on a GPU.

namespace host {
struct MmaIn {
  const uint32_t* a;
  const uint32_t* b;
};

template <int K>
void multiply(const float (&a)[16][K], const float (&b)[8][K], void* const* out) {
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      float& d = static_cast<float*>(out[row % 8 * 4 + col / 2])[row / 8 * 2 + col % 2];
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
  executor::count_mma();
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
  executor::count_mma();
}
}  // namespace host

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16_tag) {
  const host::MmaIn in{a, b};
  executor::warp_collective("mma_m16n8k16 bf16", host::mma_m16n8k16<bf16_tag>, &in, d);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16_tag) {
  const host::MmaIn in{a, b};
  executor::warp_collective("mma_m16n8k16 f16", host::mma_m16n8k16<f16_tag>, &in, d);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const host::MmaIn in{a, b};
  executor::warp_collective("mma_m16n8k8_tf32", host::mma_m16n8k8_tf32, &in, d);
}

}  // namespace clce::ptx
