// The whole forward pass in one launch, for batches so small that launches are what they wait for.
//
// Blocks meet between phases: rows are prepared, tiles become partial sums, slots are merged. Each phase is
// what a kernel of its own does otherwise, with the same tiles, slots and order of sums: the same bits.
#pragma once

#include "cuda/kernels/forward.cuh"
#include "cuda/kernels/merge_loss.cuh"
#include "cuda/kernels/prepare.cuh"
#include "cuda/list.h"

namespace clce::cuda {

template <class Product, class Shape>
struct WholeForward {
  using Element = typename Product::Element;
  using T = typename Product::Acc;
  using Bounded = ForwardTraits<Product, Shape, false>;
  using Unbounded = ForwardTraits<Product, Shape, true>;

  struct Params {
    Sides<PrepareParams<Element, T>> rows;
    uint32_t row_blocks;  // that prepare_kernel would have: these do the work of one after the other
    ForwardParams<Element, T> tiles;
    Grid tile_grid;
    MergeLossParams<T> merge;
    int merge_blocks;
  };

  static constexpr int kThreads = Bounded::kThreads, kMinBlocks = Shape::kMinBlocks;
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  static constexpr int kSharedBytes =
      larger(kMergeBytes<T>, larger(Bounded::kSharedBytes, Unbounded::kSharedBytes));
  static_assert(kThreads == 32 * kRowsPerBlock && kThreads == kMergeThreads, "every phase has these threads");

  CLCE_DEVICE static uint32_t block() { return blockIdx.y * gridDim.x + blockIdx.x; }

  struct PrepareRows {
    CLCE_DEVICE static void run(const Params& p) {
      for (uint32_t i = block(); i < p.row_blocks; i += gridDim.x * gridDim.y) {
        with_row(p.rows, i, [](const auto& side, int64_t row) { prepare_row<Element>(side, row); });
      }
    }
  };

  struct Tiles {
    CLCE_DEVICE static void run(const Params& p) {
      if (blockIdx.x >= p.tile_grid.x || blockIdx.y >= p.tile_grid.y) return;
      if (logits_are_unbounded(p.tiles.scale, p.tiles.beta, p.merge.unbounded)) {
        typename Unbounded::Block block(p.tiles);
        block.run();
      } else {
        typename Bounded::Block block(p.tiles);
        block.run();
      }
    }
  };

  struct Merge {
    CLCE_DEVICE static void run(const Params& p) {
      if (int(block()) < p.merge_blocks) merge_loss(p.merge, int(block()), p.merge_blocks);
    }
  };

  using Phases = List<PrepareRows, Tiles, Merge>;
};

}  // namespace clce::cuda
