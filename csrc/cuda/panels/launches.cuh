// Launches that both passes over panels have in common.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/panels/gradient_factors.cuh"
#include "cuda/panels/walk.h"

namespace clce::cuda {

// Zeros; whole vectors of 16 bytes.
inline void clear(void* to, size_t bytes, void* stream) {
  const int64_t count = int64_t(bytes / sizeof(ptx::Pack<uint32_t>));
  launch(clear_kernel, "clear_kernel", Grid{uint32_t(ceil_div(count, kFillThreads))}, kFillThreads, 0, stream,
         ClearParams{static_cast<ptx::Pack<uint32_t>*>(to), count});
}

// A block for each tile of a panel.
inline Grid panel_grid(const Panel& panel, int rows, int columns) {
  return {uint32_t(ceil_div(panel.columns, columns)), uint32_t(ceil_div(panel.rows, rows))};
}

}  // namespace clce::cuda
