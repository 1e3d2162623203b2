// float16 has few exponents: dL/ds is multiplied by a power of two, the unit, before it is rounded to it.
#pragma once

#include <type_traits>

#include "cuda/kernels/block_reduce.cuh"
#include "cuda/kernels/coefficients.cuh"

namespace clce::cuda {

template <class Element>
constexpr bool kHasUnit = std::is_same_v<Element, ptx::f16>;

// An upper bound of |dL/ds| over every `step`-th row of one side, from `first` on.
template <class Element, class T>
CLCE_DEVICE T largest_gradient(const Side<Element, T>& side, T beta, int64_t first, int64_t step) {
  T top = 0;
  if (!side.derivatives) return top;
  const int64_t n = side.rows.count;
  const auto size = [&](int i, int64_t row) {
    return std::abs(ptx::global_load(side.derivatives + i * n + row));
  };
  for (int64_t row = first; row < n; row += step) {
    const T positive = size(kDSumPos, row) + size(kDLsePos, row);
    const T negative = size(kDLseW, row) * beta + size(kDLseWn, row) * (1 + beta);
    const T upstream = side.upstream ? std::abs(ptx::global_load(side.upstream + row)) : T(1);
    top = Max{}(top, Max{}(negative, positive) * upstream);
  }
  return top;
}

// Where the block's `threads` threads find the same: none of dL/ds can overflow then, and as few as possible
// underflow. It is divided out at the end. `shares`: two places of shared memory for each warp.
template <class Element, class T>
CLCE_DEVICE T find_unit(const Side<Element, T>& side, const Side<Element, T>& other, T beta, int threads,
                        T* shares) {
  const bool alike = side.derivatives == other.derivatives;  // self-contrast: one scan is enough
  T largest[2] = {largest_gradient(side, beta, threadIdx.x, threads),
                  alike ? T(0) : largest_gradient(other, beta, threadIdx.x, threads)};
  block_reduce(largest, shares, threads / 32, Max{});
  const T bound = largest[0] + (alike ? largest[0] : largest[1]);
  if (!(bound > 0 && bound < T(1e30))) return 1;
  // 2^14 leaves a factor of almost 4 to the largest float16.
  const T exponent = T(14) - std::ceil(std::log2(bound));
  return std::exp2(exponent > 60 ? T(60) : exponent);
}

// The same in a launch of its own, for passes with so many rows that not each block should look at all.
template <class Element, class T>
struct FindUnitParams {
  Side<Element, T> owner, other;
  T beta;
  T* unit;
};

constexpr int kUnitThreads = 1024;

template <class Element, class T>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(kUnitThreads, 1) find_unit_kernel(FindUnitParams<Element, T> p) {
  T* const shares = reinterpret_cast<T*>(ptx::dynamic_shared());
  const T unit = find_unit(p.owner, p.other, p.beta, kUnitThreads, shares);
  if (threadIdx.x == 0) ptx::global_store(p.unit, unit);
}

}  // namespace clce::cuda
