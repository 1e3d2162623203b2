// Adds up what several blocks have made of one gradient.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

template <class T>
struct ReduceParams {
  const T* shares;  // [splits][count]
  T* total;         // [count]
  int64_t count, splits;
};

constexpr int kReduceThreads = 256;

// In the order of the shares.
template <class T>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(kReduceThreads, 1) reduce_kernel(ReduceParams<T> p) {
  using Pack = ptx::Pack<T>;
  const int64_t i = (int64_t(blockIdx.x) * kReduceThreads + threadIdx.x) * Pack::kSize;
  if (i >= p.count) return;
  Pack sum = ptx::global_load(reinterpret_cast<const Pack*>(p.shares + i));
  for (int64_t s = 1; s < p.splits; ++s) {
    const Pack share = ptx::global_load(reinterpret_cast<const Pack*>(p.shares + s * p.count + i));
#pragma unroll
    for (int k = 0; k < Pack::kSize; ++k) sum.values[k] += share.values[k];
  }
  ptx::global_store(reinterpret_cast<Pack*>(p.total + i), sum);
}

}  // namespace clce::cuda
