// The backward pass: each block owns some rows of the gradient and walks all rows of the other side.
//
//   gradient[i] = sum over j of dL/ds_ij other[j]
//
// dL/ds_ij holds what anchor i's statistics give and, in self-contrast, what anchor j's give. The same
// kernels make the anchors' gradient (owner: anchors), the keys' (owner: keys) and self-contrast's.
// A block holds kDims columns of its rows' gradient in registers. Two ways to feed the products:
// backward_resident.cuh where a row is no wider than that, backward_streaming.cuh for all others. Several
// blocks share the other side where there are few rows; reduce_kernel (reduce.cuh) adds up their shares.
#pragma once

#include <type_traits>

#include "cuda/grid.h"
#include "cuda/kernels/coefficients.cuh"
#include "cuda/kernels/sides.cuh"
#include "cuda/kernels/unit.cuh"
#include "cuda/tile/fragment.cuh"

namespace clce::cuda {

// The gradient of the owner's rows.
template <class Element, class T>
struct GradientParams {
  Side<Element, T> owner, other;
  int64_t self_offset;         // the owner's row i is row i + self_offset of the other side
  uint32_t row_tiles, splits;  // its blocks: for each tile of rows as many as share the other side
  T* gradient;                 // [splits][owner rows][stride]
};

template <class Element, class T>
struct BackwardParams {
  Sides<GradientParams<Element, T>> gradients;
  Scale<T> scale;
  T beta;
  bool has_self;
  int64_t dim, stride;  // of the rows of both sides
  const T* upstream;    // gradient of a loss that is one number, [1]; or null: 1
  const T* num_terms;   // [1] or null: 1
  const T* unit;        // float16: its unit, or null: each block finds it
};

// Bytes of shared memory in which a block finds float16's unit.
template <class Product>
constexpr int unit_bytes(int threads) {
  return kHasUnit<typename Product::Gradient> ? (2 * threads / 32 + 1) * int(sizeof(typename Product::Acc))
                                              : 0;
}

// What all blocks have in common: their part of a gradient, of the other side, and float16's unit. Traits
// has the Product, Params, the gradient's fragment FG, kN rows of the other side to a tile, and kSharesAt.
template <class Traits>
struct BackwardBlock {
  using Product = typename Traits::Product;
  using T = typename Product::Acc;
  using Params = typename Traits::Params;
  using FG = typename Traits::FG;
  using Gradients = T[FG::kMI][FG::kNI][4];
  using OneGradient = GradientParams<typename Product::Element, T>;
  static constexpr int kM = FG::kM, kThreads = FG::kThreads;
  static constexpr bool kRescale = kHasUnit<typename Product::Gradient>;
  static constexpr int kUnitAt = 2 * kThreads / 32;

  const Params& p;
  const OneGradient& mine;
  unsigned char* const memory;
  T* const shares;          // float16: two for each warp, then the unit
  const int64_t first_row;  // of the owner
  const int begin, end;     // of its tiles of the other side

  CLCE_DEVICE explicit BackwardBlock(const Params& params)
      : p(params),
        mine(params.gradients.of(blockIdx.x)),
        memory(ptx::dynamic_shared()),
        shares(reinterpret_cast<T*>(memory + Traits::kSharesAt)),
        first_row(part_of(blockIdx.x).first_row),
        begin(first_tile(part_of(blockIdx.x).share)),
        end(first_tile(part_of(blockIdx.x).share + 1)) {}

  CLCE_DEVICE int64_t first_dim() const { return int64_t(blockIdx.y) * FG::kN; }

  // The rows that a block owns, and its share of the other side.
  struct Part {
    int64_t first_row, share;
  };
  CLCE_DEVICE Part part_of(uint32_t block) const {
    const uint32_t i = p.gradients.block_of_side(block);
    return {i % mine.row_tiles * kM, i / mine.row_tiles};
  }
  // The first of the tiles of the other side that a share has.
  CLCE_DEVICE int first_tile(int64_t share) const {
    return part_begin(uint32_t(ceil_div(mine.other.rows.count, Traits::kN)), mine.splits, uint32_t(share));
  }

  CLCE_DEVICE T unit() const {
    if constexpr (kRescale) return ptx::shared_load(shares + kUnitAt);
    return 1;
  }

  CLCE_DEVICE void store_unit() const {
    if constexpr (kRescale) {
      const T unit =
          p.unit ? ptx::global_load(p.unit) : find_unit(mine.owner, mine.other, p.beta, kThreads, shares);
      if (threadIdx.x == 0) ptx::shared_store(shares + kUnitAt, unit);
      ptx::sync_threads();
    }
  }

  // The gradient, where the pairs' logits were multiplied by `scale`.
  CLCE_DEVICE void store(const Gradients& sum, T scale) const {
    const int64_t rows = mine.owner.rows.count, stride = p.stride;
    const T factor = reduced(scale / unit(), p.upstream, p.num_terms);
    const FG f = FG::opaque();
    // Computed again, for the walk leaves no register.
    const Part part = part_of(ptx::opaque(blockIdx.x));
    T* const gradient = mine.gradient + part.share * rows * stride;
#pragma unroll
    for (int mi = 0; mi < FG::kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = part.first_row + f.row(mi, 2 * half);
        if (row >= rows) continue;
#pragma unroll
        for (int ni = 0; ni < FG::kNI; ++ni) {
          const int64_t col = first_dim() + f.col(ni, 0);
          if (col >= stride) continue;
          // Padding is 0 even where the gradient is NaN.
          const ptx::Pair<T> pair{col < p.dim ? sum[mi][ni][2 * half] * factor : T(0),
                                  col + 1 < p.dim ? sum[mi][ni][2 * half + 1] * factor : T(0)};
          ptx::global_store(reinterpret_cast<ptx::Pair<T>*>(gradient + row * stride + col), pair);
        }
      }
    }
  }
};

template <class Traits>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(Traits::kThreads, Traits::kMinBlocks)
    backward_kernel(typename Traits::Params params) {
  constexpr bool kUnbounded = Traits::kUnbounded;
  if (logits_are_unbounded(params.scale, params.beta, kUnbounded) != kUnbounded) return;
  typename Traits::Block(params).run();
}

}  // namespace clce::cuda
