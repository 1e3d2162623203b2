// Starts kernels on the executor; included by csrc/cuda/launch.cuh, which says what a Grid is.
#pragma once

#include <cstddef>

#include "executor/executor.h"

namespace clce::cuda {

inline int compute_capability() {
  return executor::compute_capability();
}

// As Hopper's. Tests ask plans about other devices without it.
inline int shared_bytes_of_multiprocessor() {
  return 228 * 1024;
}

template <class Params>
void launch(void (*kernel)(Params), const char* name, Grid grid, int threads, size_t shared_bytes, void*,
            const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  executor::run(
      reinterpret_cast<const void*>(kernel), name, {grid.x, grid.y, grid.z}, static_cast<unsigned>(threads),
      shared_bytes,
      [](void* context) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel(call.params);
      },
      &call);
}

}  // namespace clce::cuda
