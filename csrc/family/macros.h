// What the formulas must know about their compiler: whether it compiles CUDA or C++.
#pragma once

#if defined(__CUDACC__)
#define CLCE_HD __host__ __device__ __forceinline__
#else
#define CLCE_HD inline
#endif

namespace clce {

// The product of a and b, rounded before anything is added to it. A compiler may otherwise fuse it with a sum
// that follows, in the forward pass but not in the backward pass, and the two would not agree on a logit.
template <class T>
CLCE_HD T rounded_product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(double)) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#else
  volatile T product = a * b;
  return product;
#endif
}

}  // namespace clce
