// What one launch does for one side or for two: the second side's blocks come after the first's.
#pragma once

#include <cstdint>

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

template <class Params>
struct Sides {
  Params sides[2];
  uint32_t blocks_of_first;

  // The side that a block works for, and which of its blocks that is.
  CLCE_DEVICE const Params& of(uint32_t block) const { return sides[block < blocks_of_first ? 0 : 1]; }
  CLCE_DEVICE uint32_t block_of_side(uint32_t block) const {
    return block < blocks_of_first ? block : block - blocks_of_first;
  }
};

}  // namespace clce::cuda
