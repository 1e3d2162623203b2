// Threads, barriers, and what the 32 lanes of a warp exchange.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace clce::ptx {

// threadIdx.x, which is read again instead of being kept in a register.
CLCE_DEVICE uint32_t thread_again() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

CLCE_DEVICE void sync_threads() {
  __syncthreads();
}

// All blocks of the grid, which have been launched for that.
CLCE_DEVICE void sync_grid() {
  cooperative_groups::this_grid().sync();
}

CLCE_DEVICE void sync_warp() {
  __syncwarp();
}

template <class T>
CLCE_DEVICE T shuffle_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// The same number, which the compiler keeps in a register instead of computing it again: for all that it
// knows, it has come from another lane.
CLCE_DEVICE uint32_t kept(uint32_t x) {
  return shuffle_xor(x, 0);
}

CLCE_DEVICE bool any_sync(bool predicate) {
  return __any_sync(0xffffffffu, predicate) != 0;
}

CLCE_DEVICE uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

}  // namespace clce::ptx
