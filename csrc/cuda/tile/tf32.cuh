// Products of float32 tiles on the tensor cores, operands rounded to TF32, accumulated in float32.
#pragma once

#include "cuda/tile/fma.cuh"

namespace clce::cuda {

struct Tf32Product {
  using Element = float;
  using Acc = float;
  using Gradient = float;

  // What a lane keeps for that product of all tiles.
  template <class F, class A, class B>
  using Reads = F;

  // sum += a b^T over the tiles' columns; a [kM, k], b [kN, k].
  template <class F, class A, class B>
  CLCE_DEVICE static void multiply_transposed(const F& f, float (&sum)[F::kMI][F::kNI][4], const A& a,
                                              const B& b) {
    static_assert(A::kCols % 8 == 0, "one mma takes 8 columns");
#pragma unroll
    for (int k = 0; k < A::kCols; k += 8) {
      uint32_t y[F::kNI][2];
#pragma unroll
      for (int ni = 0; ni < F::kNI; ++ni) {
        const int row = f.first_col() + ni * 8 + f.group;
        y[ni][0] = load(b.at(row, k + f.pair));
        y[ni][1] = load(b.at(row, k + f.pair + 4));
      }
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) {
        uint32_t x[4];
        load_a(x, f, a, mi, k);
#pragma unroll
        for (int ni = 0; ni < F::kNI; ++ni) ptx::mma_m16n8k8_tf32(sum[mi][ni], x, y[ni]);
      }
    }
  }

  // sum += g[:, first : first + k] x over x's rows; g [kM, n], x [k, kN].
  template <class F, class G, class X>
  CLCE_DEVICE static void multiply(const F& f, float (&sum)[F::kMI][F::kNI][4], const G& g, int first,
                                   const X& x) {
    static_assert(X::kRows % 8 == 0, "one mma takes 8 rows");
#pragma unroll
    for (int k = 0; k < X::kRows; k += 8) {
      uint32_t w[F::kMI][4];
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) load_a(w[mi], f, g, mi, first + k);
#pragma unroll
      for (int ni = 0; ni < F::kNI; ++ni) {
        const int col = f.first_col() + ni * 8 + f.group;
        const uint32_t y[2] = {load(x.at(k + f.pair, col)), load(x.at(k + f.pair + 4, col))};
#pragma unroll
        for (int mi = 0; mi < F::kMI; ++mi) ptx::mma_m16n8k8_tf32(sum[mi][ni], w[mi], y);
      }
    }
  }

  CLCE_DEVICE static void store_pair(float* g, float low, float high) {
    FmaProduct<float>::store_pair(g, low, high);
  }

 private:
  CLCE_DEVICE static uint32_t load(const float* address) { return ptx::to_tf32(ptx::shared_load(address)); }

  template <class F, class A>
  CLCE_DEVICE static void load_a(uint32_t (&x)[4], const F& f, const A& a, int mi, int k) {
    const int row = f.row(mi, 0);
    x[0] = load(a.at(row, k + f.pair));
    x[1] = load(a.at(row + 8, k + f.pair));
    x[2] = load(a.at(row, k + f.pair + 4));
    x[3] = load(a.at(row + 8, k + f.pair + 4));
  }
};

}  // namespace clce::cuda
