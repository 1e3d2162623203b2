// From a dot product to its logit, and to the logit's exponentials.
#pragma once

#include <type_traits>

#include "cuda/ptx/ptx.cuh"
#include "family/statistics.h"

namespace clce::cuda {

// 1 / temperature, from the device if it lies there.
template <class T>
struct Scale {
  const T* temperature;
  T value;
  // The temperature, which only the device knows, decides whether logits are bounded. Kernels for both kinds
  // are launched then, and one of them leaves at once.
  bool decides;
};

template <class T>
CLCE_DEVICE T load_scale(const Scale<T>& scale) {
  return scale.temperature ? T(1) / ptx::global_load(scale.temperature) : scale.value;
}

// `otherwise`, where the temperature does not decide it.
template <class T>
CLCE_DEVICE bool logits_are_unbounded(const Scale<T>& scale, T beta, bool otherwise) {
  if (!scale.decides) return otherwise;
  return !clce::logits_are_bounded(true, double(ptx::global_load(scale.temperature)), double(beta));
}

// s = dot / t, where sums are shifted by it: the passes must agree on it to the last bit.
template <class T>
CLCE_DEVICE T logit(T dot, T scale) {
  return rounded_product(dot, scale);
}

// How a pass takes the exponentials of its logits.
enum class Exponentials {
  kOne,        // bounded logits, beta 0 or 1: e^s, of which e^(2 s) is the square
  kTwo,        // bounded logits, any other beta
  kUnbounded,  // unbounded logits: shifted by running maxima, or by the statistics
};

// Calls use(std::integral_constant<Exponentials, ...>).
template <bool kUnbounded, class T, class Use>
CLCE_DEVICE void with_exponentials(T beta, Use use) {
  if constexpr (kUnbounded) {
    use(std::integral_constant<Exponentials, Exponentials::kUnbounded>{});
  } else if (beta == 0 || beta == 1) {
    use(std::integral_constant<Exponentials, Exponentials::kOne>{});
  } else {
    use(std::integral_constant<Exponentials, Exponentials::kTwo>{});
  }
}

template <class T>
constexpr T kLog2E = T(1.4426950408889634074);

CLCE_DEVICE float exp2_of(float x) {
  return ptx::exp2_fast(x);
}
CLCE_DEVICE double exp2_of(double x) {
  return std::exp2(x);
}

}  // namespace clce::cuda
