// What a panel's gradients are multiplied by, before and after the products.
#pragma once

#include "cuda/kernels/unit.cuh"
#include "dispatch.h"

namespace clce::cuda {

template <class Element, class T>
struct GradientFactorsParams {
  Side<Element, T> anchors, keys;
  Scale<T> scale;
  T beta;
  const T* upstream;   // gradient of a loss that is one number, [1]; or null: 1
  const T* num_terms;  // [1] or null: 1
  // [2]: what multiplies dL/ds before it is rounded, and what multiplies the sums. float16: the unit, and the
  // rest of the gradient's factor. Others: all of it at once, and nothing is left.
  T* factors;
};

constexpr int kFactorThreads = 512;

template <class Element, class T>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(kFactorThreads, 1)
    gradient_factors_kernel(GradientFactorsParams<Element, T> p) {
  T unit = 1;
  if constexpr (kHasUnit<Element>) {
    unit = find_unit(p.anchors, p.keys, p.beta, kFactorThreads, reinterpret_cast<T*>(ptx::dynamic_shared()));
  }
  if (threadIdx.x != 0) return;
  const T factor = reduced(load_scale(p.scale), p.upstream, p.num_terms);
  ptx::global_store(p.factors, kHasUnit<Element> ? unit : factor);
  ptx::global_store(p.factors + 1, kHasUnit<Element> ? factor / unit : T(1));
}

constexpr int kMultiplyThreads = 256;

template <class T>
struct MultiplyParams {
  T* gradient;  // [rows][stride]
  int64_t count, stride, dim;
  const T* factors;  // the second
};

template <class T>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(kMultiplyThreads, 1) multiply_kernel(MultiplyParams<T> p) {
  using Pack = ptx::Pack<T>;
  const int64_t i = (int64_t(blockIdx.x) * kMultiplyThreads + threadIdx.x) * Pack::kSize;
  if (i >= p.count) return;
  const T factor = ptx::global_load(p.factors + 1);
  Pack* const place = reinterpret_cast<Pack*>(p.gradient + i);
  Pack pack = ptx::global_load(place);
#pragma unroll
  for (int k = 0; k < Pack::kSize; ++k) {
    // Padding is 0 even where the factor is NaN.
    pack.values[k] = i % p.stride + k < p.dim ? pack.values[k] * factor : T(0);
  }
  ptx::global_store(place, pack);
}

}  // namespace clce::cuda
