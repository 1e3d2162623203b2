// The gradient by the temperature, of what the backward pass has left for each row.
#pragma once

#include "cuda/kernels/block_reduce.cuh"
#include "cuda/kernels/coefficients.cuh"
#include "family/loss.h"

namespace clce::cuda {

template <class T>
struct TemperatureGradientParams {
  const T* dots;  // [rows]
  int64_t rows;
  bool symmetric;
  const T* by_scale;  // [anchors], derivatives by 1 / temperature
  int64_t anchors;
  const T* upstream_of_rows;  // gradients of the anchors' losses, [anchors]; or null: 1
  const T* upstream;          // gradient of a loss that is one number, [1]; or null: 1
  const T* num_terms;         // [1] or null: 1
  Scale<T> scale;
  T* gradient;  // [1]
};

constexpr int kTemperatureThreads = 512;

// One block: these are a few numbers for each row.
template <class T>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(kTemperatureThreads, 1)
    temperature_gradient_kernel(TemperatureGradientParams<T> p) {
  double sums[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < p.rows; i += kTemperatureThreads) sums[0] += ptx::global_load(p.dots + i);
  for (int64_t i = threadIdx.x; i < p.anchors; i += kTemperatureThreads) {
    const double upstream = p.upstream_of_rows ? ptx::global_load(p.upstream_of_rows + i) : T(1);
    sums[1] += ptx::global_load(p.by_scale + i) * upstream;
  }
  block_reduce(sums, reinterpret_cast<double*>(ptx::dynamic_shared()), kTemperatureThreads / 32, Add{});
  if (threadIdx.x != 0) return;
  const double by_scale = reduced(T(1), p.upstream, p.num_terms) * sums[1];
  const double t = 1 / double(load_scale(p.scale));
  ptx::global_store(p.gradient, T(gradient_by_temperature(sums[0], p.symmetric, by_scale, t)));
}

}  // namespace clce::cuda
