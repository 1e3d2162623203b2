// Products of bfloat16 or float16 tiles on the tensor cores, accumulated in float32.
#pragma once

#include "cuda/tile/fragment.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace clce::cuda {

template <class T>
struct HalfFormat;

template <>
struct HalfFormat<ptx::bf16> {
  using Tag = ptx::bf16_tag;
  CLCE_DEVICE static uint32_t pack(float low, float high) { return ptx::pack_bf16x2(low, high); }
};

template <>
struct HalfFormat<ptx::f16> {
  using Tag = ptx::f16_tag;
  CLCE_DEVICE static uint32_t pack(float low, float high) { return ptx::pack_f16x2(low, high); }
};

template <class T>
struct HalfProduct {
  using Element = T;
  using Acc = float;
  using Gradient = T;
  using Tag = typename HalfFormat<T>::Tag;

  // Where a lane reads a [kM, k] and b [kN, k] for a b^T: elements from the tiles' bases.
  template <class F, class A, class B>
  struct Reads {
    uint32_t a, b;

    CLCE_DEVICE explicit Reads(const F& f) {
      const uint32_t lane = threadIdx.x % 32;
      a = (uint32_t(f.first_row()) + lane % 16) * A::kStride + lane / 16 * 8;
      // Matrices: columns 0-7 of b's rows 0-7, columns 8-15 of them, then the same of rows 8-15.
      b = (uint32_t(f.first_col()) + lane / 16 * 8 + lane % 8) * B::kStride + lane / 8 % 2 * 8;
    }
    // For a walk over many tiles.
    CLCE_DEVICE static Reads kept() {
      Reads reads{F()};
      reads.a = ptx::kept(reads.a), reads.b = ptx::kept(reads.b);
      return reads;
    }
  };

  // sum += a b^T over the tiles' columns.
  template <class F, class A, class B>
  CLCE_DEVICE static void multiply_transposed(const F& f, float (&sum)[F::kMI][F::kNI][4], const A& a,
                                              const B& b) {
    multiply_transposed(Reads<F, A, B>(f), sum, a, b);
  }
  template <class F, class A, class B>
  CLCE_DEVICE static void multiply_transposed(const Reads<F, A, B>& reads, float (&sum)[F::kMI][F::kNI][4],
                                              const A& a, const B& b) {
    static_assert(F::kNI % 2 == 0 && A::kCols % 16 == 0, "b is read in pieces of 16 x 16");
#pragma unroll
    for (int k = 0; k < A::kCols; k += 16) {
      uint32_t y[F::kNI][2];
#pragma unroll
      for (int ni = 0; ni < F::kNI; ni += 2) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, b.at(ni * 8, k) + reads.b);
        y[ni][0] = r[0], y[ni][1] = r[1], y[ni + 1][0] = r[2], y[ni + 1][1] = r[3];
      }
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) {
        uint32_t x[4];
        ptx::ldmatrix_x4(x, a.at(mi * 16, k) + reads.a);
#pragma unroll
        for (int ni = 0; ni < F::kNI; ++ni) ptx::mma_m16n8k16(sum[mi][ni], x, y[ni], Tag{});
      }
    }
  }

  // sum += g[:, first : first + k] x over x's rows; g [kM, n], x [k, kN].
  template <class F, class G, class X>
  CLCE_DEVICE static void multiply(const F& f, float (&sum)[F::kMI][F::kNI][4], const G& g, int first,
                                   const X& x) {
    static_assert(X::kRows % 16 == 0, "x is read in pieces of 16 x 16");
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < X::kRows; k += 16) {
      uint32_t w[F::kMI][4];
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) {
        ptx::ldmatrix_x4(w[mi], g.at(f.first_row() + mi * 16 + lane % 16, first + k + lane / 16 * 8));
      }
      multiply_piece(f, sum, w, x, k);
    }
  }

  // The same where registers hold the first operand: the warp's rows, and 16 columns to a piece.
  template <class F>
  using Operand = uint32_t[F::kMI][4];

  // All of a [kM, k].
  template <class F, int kPieces, class A>
  CLCE_DEVICE static void load_rows(const F& f, Operand<F> (&x)[kPieces], const A& a) {
    static_assert(16 * kPieces == A::kCols);
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) {
        ptx::ldmatrix_x4(x[k][mi], a.at(f.first_row() + mi * 16 + lane % 16, 16 * k + lane / 16 * 8));
      }
    }
  }

  // sum += x b[first : first + kN]^T
  template <class F, int kPieces, class B>
  CLCE_DEVICE static void multiply_rows_transposed(const F& f, float (&sum)[F::kMI][F::kNI][4],
                                                   const Operand<F> (&x)[kPieces], const B& b, int first) {
    static_assert(F::kNI % 2 == 0 && 16 * kPieces == B::kCols, "b is read in pieces of 16 x 16");
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
#pragma unroll
      for (int ni = 0; ni < F::kNI; ni += 2) {
        uint32_t r[4];
        ptx::ldmatrix_x4(
            r, b.at(first + f.first_col() + ni * 8 + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8));
        const uint32_t y[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
        for (int mi = 0; mi < F::kMI; ++mi) {
          ptx::mma_m16n8k16(sum[mi][ni], x[k][mi], y[0], Tag{});
          ptx::mma_m16n8k16(sum[mi][ni + 1], x[k][mi], y[1], Tag{});
        }
      }
    }
  }

  // sum += w x[first : first + 16]
  template <class F, class X>
  CLCE_DEVICE static void multiply_piece(const F& f, float (&sum)[F::kMI][F::kNI][4], const Operand<F>& w,
                                         const X& x, int first) {
    static_assert(F::kNI % 2 == 0, "x is read in pieces of 16 x 16");
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int ni = 0; ni < F::kNI; ni += 2) {
      // x lies with the summed index down its rows: transposed on the way.
      uint32_t r[4];
      ptx::ldmatrix_x4_trans(r, x.at(first + lane % 16, f.first_col() + ni * 8 + lane / 16 * 8));
      const uint32_t y[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) {
        ptx::mma_m16n8k16(sum[mi][ni], w[mi], y[0], Tag{});
        ptx::mma_m16n8k16(sum[mi][ni + 1], w[mi], y[1], Tag{});
      }
    }
  }

  // Two neighbours in a row, as they are stored and as an operand's register holds them.
  CLCE_DEVICE static uint32_t pack(float low, float high) { return HalfFormat<T>::pack(low, high); }

  CLCE_DEVICE static void store_pair(T* g, float low, float high) {
    ptx::shared_store(reinterpret_cast<uint32_t*>(g), pack(low, high));
  }
};

}  // namespace clce::cuda
