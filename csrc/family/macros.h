// The one place where the formulas learn for what they are compiled.
#pragma once

#if defined(__CUDACC__)
#define CLCE_HD __host__ __device__ __forceinline__
#else
#define CLCE_HD inline
#endif

namespace clce {

// a b, rounded. A compiler may otherwise fuse the product into a sum that follows, in one place and not in
// another: two passes would know different logits.
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
