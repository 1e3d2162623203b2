// Starts kernels on the executor; included by csrc/cuda/launch.cuh, which says what a Grid is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/ptx/ptx.cuh"
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
  const auto body = [](void* context) {
    const Call& call = *static_cast<const Call*>(context);
    call.kernel(call.params);
  };
  executor::run(reinterpret_cast<const void*>(kernel), name, {grid.x, grid.y, grid.z},
                static_cast<unsigned>(threads), shared_bytes, {body}, &call);
}

struct ClearParams {
  void* to;
  size_t bytes;  // a multiple of 16
};

// One thread's stores, which are looked at like any others.
inline void clear_kernel(ClearParams p) {
  using Vector = ptx::Pack<uint32_t>;
  for (size_t i = 0; i < p.bytes / sizeof(Vector); ++i) {
    ptx::global_store(static_cast<Vector*>(p.to) + i, Vector{});
  }
}

inline void clear(void* to, size_t bytes, void* stream) {
  launch(clear_kernel, "clear", Grid{}, 1, 0, stream, ClearParams{to, bytes});
}

template <class Params, class... Phases>
std::vector<executor::Body> bodies_of(List<Phases...>) {
  return {[](void* context) { Phases::run(*static_cast<const Params*>(context)); }...};
}

// By its address coverage.h knows the phases.
template <class Whole>
void phases_kernel() {}

template <class Whole>
bool launch_phases(const char* name, Grid grid, void*, const typename Whole::Params& params) {
  using Params = typename Whole::Params;
  if (int64_t(grid.x) * grid.y * grid.z > executor::blocks_at_once()) return false;
  executor::run(reinterpret_cast<const void*>(&phases_kernel<Whole>), name, {grid.x, grid.y, grid.z},
                static_cast<unsigned>(Whole::kThreads), Whole::kSharedBytes,
                bodies_of<Params>(typename Whole::Phases{}), const_cast<Params*>(&params));
  return true;
}

}  // namespace clce::cuda
