// Launches that both passes over panels have in common.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/panels/gradient_factors.cuh"
#include "cuda/panels/walk.h"

namespace clce::cuda {

// A block for each tile of a panel.
inline Grid panel_grid(const Panel& panel, int rows, int columns) {
  return {uint32_t(ceil_div(panel.columns, columns)), uint32_t(ceil_div(panel.rows, rows))};
}

}  // namespace clce::cuda
