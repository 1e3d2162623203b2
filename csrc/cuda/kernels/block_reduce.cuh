// Numbers of a warp's or a block's threads combined into one, always in the same order.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

struct Add {
  template <class T>
  CLCE_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// The largest; NaN is passed over.
struct Max {
  template <class T>
  CLCE_DEVICE T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// Every lane gets the result.
template <class T, class Combine>
CLCE_DEVICE T warp_reduce(T mine, Combine combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) mine = combine(mine, ptx::shuffle_xor(mine, mask));
  return mine;
}

// Combines kCount numbers of each thread over the block, in place; every thread gets the results. `shares`,
// in shared memory, has kCount places for each of the block's warps; nobody may read it any more.
template <int kCount, class T, class Combine>
CLCE_DEVICE void block_reduce(T (&mine)[kCount], T* shares, int warps, Combine combine) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) mine[i] = warp_reduce(mine[i], combine);
  ptx::sync_threads();
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) ptx::shared_store(shares + int(threadIdx.x) / 32 * kCount + i, mine[i]);
  }
  ptx::sync_threads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) mine[i] = ptx::shared_load(shares + i);
  for (int w = 1; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) mine[i] = combine(mine[i], ptx::shared_load(shares + w * kCount + i));
  }
}

}  // namespace clce::cuda
