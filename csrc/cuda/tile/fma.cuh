// Products of tiles by fused multiply-adds, in the accumulation type: float32 and float64 at full accuracy.
#pragma once

#include "cuda/tile/fragment.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace clce::cuda {

template <class T>
struct FmaProduct {
  using Element = T;
  using Acc = T;
  using Gradient = T;  // what dL/ds is rounded to before its product with embeddings

  // What a lane keeps for that product of all tiles.
  template <class F, class A, class B>
  using Reads = F;

  // sum += a b^T over the tiles' columns; a [kM, k], b [kN, k].
  template <class F, class A, class B>
  CLCE_DEVICE static void multiply_transposed(const F& f, Acc (&sum)[F::kMI][F::kNI][4], const A& a,
                                              const B& b) {
    constexpr int kVector = ptx::Pack<T>::kSize;
#pragma unroll 1
    for (int k = 0; k < A::kCols; k += kVector) {
      ptx::Pack<T> y[F::kNI][2];
#pragma unroll
      for (int ni = 0; ni < F::kNI; ++ni) {
#pragma unroll
        for (int e = 0; e < 2; ++e) y[ni][e] = load_pack(b.at(f.col(ni, e), k));
      }
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const ptx::Pack<T> x = load_pack(a.at(f.row(mi, 2 * half), k));
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
#pragma unroll
            for (int ni = 0; ni < F::kNI; ++ni) {
              sum[mi][ni][2 * half] += x.values[i] * y[ni][0].values[i];
              sum[mi][ni][2 * half + 1] += x.values[i] * y[ni][1].values[i];
            }
          }
        }
      }
    }
  }

  // sum += g[:, first : first + k] x over x's rows; g [kM, n], x [k, kN].
  template <class F, class G, class X>
  CLCE_DEVICE static void multiply(const F& f, Acc (&sum)[F::kMI][F::kNI][4], const G& g, int first,
                                   const X& x) {
#pragma unroll 1
    for (int k = 0; k < X::kRows; ++k) {
      T y[F::kNI][2];
#pragma unroll
      for (int ni = 0; ni < F::kNI; ++ni) {
#pragma unroll
        for (int e = 0; e < 2; ++e) y[ni][e] = ptx::shared_load(x.at(k, f.col(ni, e)));
      }
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const T w = ptx::shared_load(g.at(f.row(mi, 2 * half), first + k));
#pragma unroll
          for (int ni = 0; ni < F::kNI; ++ni) {
            sum[mi][ni][2 * half] += w * y[ni][0];
            sum[mi][ni][2 * half + 1] += w * y[ni][1];
          }
        }
      }
    }
  }

  // g[row, col], g[row, col + 1] = low, high
  CLCE_DEVICE static void store_pair(T* g, T low, T high) {
    ptx::shared_store(reinterpret_cast<ptx::Pair<T>*>(g), ptx::Pair<T>{low, high});
  }

 private:
  CLCE_DEVICE static ptx::Pack<T> load_pack(const T* address) {
    return ptx::shared_load(reinterpret_cast<const ptx::Pack<T>*>(address));
  }
};

}  // namespace clce::cuda
