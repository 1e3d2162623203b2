// The forward pass: tiles of logits to partial sums per anchor.
//
// A block walks the tiles of a rectangle of anchors and keys and leaves, for each of its anchors, the
// sums over its keys in one scratch slot. In self-contrast the logits are symmetric: the rows are cut
// into G groups, block (P, Q), P <= Q, walks the tiles on and above the diagonal, and adds each tile to
// its rows (slot Q) and to its columns (slot P). Slot [q][field][row] is written by one block only, so
// nothing is added atomically and the bits never change.
#pragma once

#include "cuda/grid.h"
#include "cuda/kernels/tile_sums.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace clce::cuda {

template <class Element, class T>
struct ForwardParams {
  Rows<Element> anchors, keys;
  Labels anchor_labels, key_labels;
  Scale<T> scale;
  T beta;
  bool symmetric, has_self;
  int64_t self_offset;
  int groups;        // symmetric: G; else the number of column splits
  T* slots;          // [groups][fields][M]
  uint32_t* ticket;  // set to 0 for the merge that follows
};

// A block's tiles, by their places in the grid of all tiles.
struct TileRectangle {
  int row_begin, row_end, col_begin, col_end;
  bool triangular;  // only tiles with col >= row

  CLCE_DEVICE int first_col(int row) const { return triangular && row > col_begin ? row : col_begin; }
};

// Goes through them row by row.
struct TilePlace {
  int row, col;

  CLCE_DEVICE void next(const TileRectangle& all) {
    if (++col < all.col_end) return;
    ++row;
    col = all.first_col(row);
  }
};

template <class Product_, class Shape, bool kUnbounded_>
struct ForwardTraits {
  using Product = Product_;
  using F = typename Shape::Logits;
  using T = typename Product::Acc;
  static constexpr bool kUnbounded = kUnbounded_;
  static constexpr int kDepth = Shape::kDepth, kThreads = F::kThreads;
  // Sums of unbounded logits need more registers, and are the exception: their blocks may be alone.
  static constexpr int kMinBlocks = kUnbounded ? 1 : Shape::kMinBlocks;
  using Params = ForwardParams<typename Product::Element, T>;
  using TileA = SharedTile<typename Product::Element, F::kM, kDepth>;
  using TileB = SharedTile<typename Product::Element, F::kN, kDepth>;
  using Ring = Pipeline<Shape::kStages, TileA::kBytes + TileB::kBytes>;
  using Sums = TileSums<T, F, kUnbounded>;
  static constexpr int kPlaces = F::kM + F::kN;
  using LabelsOfTile = TileLabels<kPlaces>;
  static constexpr int kSumsAt = Ring::kBytes, kLabelsAt = kSumsAt + Sums::kBytes;
  static constexpr int kSharedBytes = kLabelsAt + LabelsOfTile::kBytes;
  static_assert(F::kM == F::kN, "symmetric tiles are square");
  static_assert(kThreads >= kPlaces, "each row and each column of the tile has a thread");
};

// The steps of a block's tiles, for the pipeline.
template <class Traits>
struct ForwardSteps {
  using TileA = typename Traits::TileA;
  using TileB = typename Traits::TileB;

  using Embeddings = Rows<typename TileA::Element>;

  const typename Traits::Params& p;
  const TileRectangle& all;
  const int steps;  // of a tile
  TilePlace tile;   // of the next step
  int step = 0;
  Embeddings rows, cols;  // from the tile on
  TileCopies<Traits::kThreads, TileA> copies;

  CLCE_DEVICE ForwardSteps(const typename Traits::Params& p, const TileRectangle& all, int steps,
                           const TilePlace& first)
      : p(p), all(all), steps(steps), tile(first), copies(p.anchors.stride) {
    seek();
  }

  CLCE_DEVICE bool left() const { return tile.row < all.row_end; }
  CLCE_DEVICE void seek() {
    rows = p.anchors.from(int64_t(tile.row) * TileA::kRows);
    cols = p.keys.from(int64_t(tile.col) * TileB::kRows);
  }
  CLCE_DEVICE void load(unsigned char* to) {
    const int col = step * Traits::kDepth;
    copies.start(TileA(to), rows, col);
    copies.start(TileB(to + TileA::kBytes), cols, col);
    if (++step == steps) {
      step = 0;
      tile.next(all);
      seek();
    }
  }
};

template <class Traits>
struct ForwardBlock {
  using F = typename Traits::F;
  using T = typename Traits::T;
  using Params = typename Traits::Params;
  using Sums = typename Traits::Sums;
  using TileA = typename Traits::TileA;
  using TileB = typename Traits::TileB;
  static constexpr int kM = F::kM, kN = F::kN;
  static constexpr bool kUnbounded = Traits::kUnbounded;

  const Params& p;
  const F f;
  unsigned char* const memory;
  const Sums sums;
  const typename Traits::LabelsOfTile labels;  // of the tile's rows, then of its columns

  CLCE_DEVICE explicit ForwardBlock(const Params& params)
      : p(params),
        f(),
        memory(ptx::dynamic_shared()),
        sums(memory + Traits::kSumsAt),
        labels(memory + Traits::kLabelsAt) {}

  // The slots of the block's rows and columns are named by its groups of columns and rows.
  CLCE_DEVICE TileRectangle rectangle(int& row_slot, int& col_slot) const {
    const uint32_t row_tiles = uint32_t(ceil_div(p.anchors.count, kM)),
                   col_tiles = uint32_t(ceil_div(p.keys.count, kN));
    TileRectangle all;
    int first = 0, second = int(blockIdx.y);
    if (p.symmetric) {
      int rest = int(blockIdx.x);
      for (; rest >= p.groups - first; ++first) rest -= p.groups - first;
      second = first + rest;
      all.row_begin = part_begin(row_tiles, p.groups, first);
      all.row_end = part_begin(row_tiles, p.groups, first + 1);
    } else {
      all.row_begin = int(blockIdx.x);
      all.row_end = all.row_begin + 1;
    }
    all.col_begin = part_begin(col_tiles, p.groups, second);
    all.col_end = part_begin(col_tiles, p.groups, second + 1);
    all.triangular = p.symmetric && first == second;
    row_slot = second;
    col_slot = first;
    return all;
  }

  // Thread t has the label of the tile's row t, or column t - kM.
  CLCE_DEVICE bool has_label() const { return int(threadIdx.x) < Traits::kPlaces; }
  CLCE_DEVICE const Labels& label_side() const {
    return int(threadIdx.x) < kM ? p.anchor_labels : p.key_labels;
  }
  CLCE_DEVICE int64_t fetch_label(const TilePlace& at) const {
    const int t = int(threadIdx.x);
    return has_label()
               ? load_label(label_side(), t < kM ? int64_t(at.row) * kM + t : int64_t(at.col) * kN + (t - kM))
               : 0;
  }
  CLCE_DEVICE void store_label(int64_t label) const {
    if (has_label()) labels.store(int(threadIdx.x), label, label_side().none);
  }

  // Adds to what this block has put in the slot, or puts it there first.
  CLCE_DEVICE void add_to_slot(int64_t index, int64_t row, bool first, const PartialSums<T>& value) const {
    if (row >= p.anchors.count) return;
    T* const slot = p.slots + index * Sums::kFields * p.anchors.count + row;
    add_partial_sums(slot, p.anchors.count, kUnbounded, first, p.beta, value);
  }

  CLCE_DEVICE void run() const {
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) ptx::global_store(p.ticket, 0u);
    int row_slot, col_slot;
    const TileRectangle all = rectangle(row_slot, col_slot);
    TilePlace at{all.row_begin, all.first_col(all.row_begin)};
    const int steps = int(ceil_div(p.anchors.stride, Traits::kDepth));
    ForwardSteps<Traits> ahead(p, all, steps, at);
    typename Traits::Ring ring(memory);
    ring.start(ahead);

    const T scale = load_scale(p.scale);
    while (at.row < all.row_end) {
      // On its way during the first step.
      const int64_t label = fetch_label(at);
      T dots[F::kMI][F::kNI][4];
      set_zero(dots);
      for (int step = 0; step < steps; ++step) {
        unsigned char* const ready = ring.next(ahead);
        Traits::Product::multiply_transposed(f, dots, TileA(ready), TileB(ready + TileA::kBytes));
        if (step == 0) store_label(label);
      }
      if (steps == 1) ptx::sync_threads();

      const bool with_columns = p.symmetric && at.row != at.col;
      const int self = self_difference(p.has_self, p.self_offset, int64_t(at.row) * kM, int64_t(at.col) * kN);
      const bool masked = !labels.all_valid() || (self < kN && self > -kM);
      const F here = F::opaque();
      Pairs<F> pairs;
      classify(here, pairs, labels, masked, self);
      sums.write(here, dots, pairs, scale, p.beta, with_columns, masked);
      ptx::sync_threads();

      const int t = int(threadIdx.x);
      const TilePlace tile = at;
      at.next(all);
      if (t < kM) {
        // The first that the block adds to this row; in the diagonal's group it may have been a column
        // before.
        const bool first =
            tile.col == all.first_col(tile.row) && (!all.triangular || tile.row == all.row_begin);
        add_to_slot(row_slot, int64_t(tile.row) * kM + t, first, sums.row(t, p.beta, masked));
      } else if (t < Traits::kPlaces && with_columns) {
        add_to_slot(col_slot, int64_t(tile.col) * kN + (t - kM), tile.row == all.row_begin,
                    sums.col(t - kM, p.beta, masked));
      }
    }
    ring.finish();
  }
};

template <class Traits>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(Traits::kThreads, Traits::kMinBlocks)
    forward_kernel(typename Traits::Params params) {
  constexpr bool kUnbounded = Traits::kUnbounded;
  if (logits_are_unbounded(params.scale, params.beta, kUnbounded) != kUnbounded) return;
  ForwardBlock<Traits>(params).run();
}

}  // namespace clce::cuda
