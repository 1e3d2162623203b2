// Launches that both passes over panels have in common.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/panels/gradient_factors.cuh"
#include "cuda/panels/walk.h"

namespace clce::cuda {

// Zeros; whole vectors of 16 bytes.
inline void clear(void* to, size_t bytes, void* stream) {
  using Vector = ptx::Pack<uint32_t>;
  const int64_t count = int64_t(bytes / sizeof(Vector));
  launch(clear_kernel<Vector>, "clear_kernel", Grid{uint32_t(ceil_div(count, kFillThreads))}, kFillThreads, 0,
         stream, ClearParams<Vector>{static_cast<Vector*>(to), count});
}

// A block for each tile of a panel.
inline Grid panel_grid(const Panel& panel, int rows, int columns) {
  return {uint32_t(ceil_div(panel.columns, columns)), uint32_t(ceil_div(panel.rows, rows))};
}

}  // namespace clce::cuda
