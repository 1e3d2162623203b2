// The forward pass: tiles of logits to partial sums per anchor.
//
// A block walks the tiles of a rectangle of anchors and keys and leaves, for each of its anchors, the
// sums over its keys in one scratch slot. In self-contrast the logits are symmetric: the rows are cut
// into G groups, block (P, Q), P <= Q, walks the tiles on and above the diagonal, and adds each tile to
// its rows (slot Q) and to its columns (slot P). Slot [q][field][row] is written by one block only, so
// nothing is added atomically and the bits never change.
#pragma once

#include "cuda/kernels/tile_sums.cuh"
#include "cuda/launch.cuh"

namespace clce::cuda {

template <class Element, class T>
struct ForwardParams {
  Matrix<Element> anchors, keys;
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

template <class Engine_, class Shape, bool kMaxima_>
struct ForwardTraits {
  using Engine = Engine_;
  using F = typename Shape::Logits;
  using T = typename Engine::Acc;
  static constexpr int kDepth = Shape::kDepth, kStages = Shape::kStages, kThreads = F::kThreads;
  // The sums with maxima need more registers, and are not made where time counts.
  static constexpr int kMinBlocks = kMaxima_ ? 1 : Shape::kMinBlocks;
  using Params = ForwardParams<typename Engine::Element, T>;
  using TileA = SharedTile<typename Engine::Element, F::kM, kDepth>;
  using TileB = SharedTile<typename Engine::Element, F::kN, kDepth>;
  using Sums = TileSums<T, F, kMaxima_>;
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  static constexpr int kPlaces = F::kM + F::kN;
  using LabelsOfTile = TileLabels<kPlaces>;
  static constexpr int kSharedBytes = kStages * kStageBytes + Sums::kBytes + LabelsOfTile::kBytes;
  static_assert(shared_fits(kSharedBytes, kMinBlocks), "every device since sm_80 can run it");
  static_assert(F::kM == F::kN, "symmetric tiles are square");
  static_assert(kThreads >= kPlaces, "each row and each column of the tile has a thread");
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
  static constexpr bool kMaxima = Sums::kMaxima;

  const Params& p;
  const F f;
  unsigned char* stages;
  const Sums sums;
  const typename Traits::LabelsOfTile labels;  // of the tile's rows, then of its columns

  CLCE_DEVICE explicit ForwardBlock(const Params& params)
      : p(params),
        f(),
        stages(ptx::dynamic_shared()),
        sums(stages + Traits::kStages * Traits::kStageBytes),
        labels(stages + Traits::kStages * Traits::kStageBytes + Sums::kBytes) {}

  // The slots of the block's rows and columns are named by its groups of columns and rows.
  CLCE_DEVICE TileRectangle rectangle(int& row_slot, int& col_slot) const {
    const uint32_t row_tiles = uint32_t(ceil_div(p.anchors.rows, kM)),
                   col_tiles = uint32_t(ceil_div(p.keys.rows, kN));
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

  CLCE_DEVICE T* slot(int64_t index, int64_t row) const {
    return p.slots + index * Sums::kFields * p.anchors.rows + row;
  }

  // Adds to what this block has put in the slot, or puts it there first.
  CLCE_DEVICE void add_to_slot(int64_t index, int64_t row, bool first, PartialSums<T> value) const {
    if (row >= p.anchors.rows) return;
    T* const place = slot(index, row);
    if (!first) {
      PartialSums<T> before = load_partial<T>(place, p.anchors.rows, kMaxima);
      combine(before, value, kMaxima, p.beta);
      value = before;
    }
    store_partial(place, p.anchors.rows, kMaxima, value);
  }

  CLCE_DEVICE void run() const {
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) ptx::global_store(p.ticket, 0u);
    int row_slot, col_slot;
    const TileRectangle all = rectangle(row_slot, col_slot);
    TilePlace at{all.row_begin, all.first_col(all.row_begin)};
    const int steps = int(ceil_div(p.anchors.stride, Traits::kDepth));
    TilePlace ahead = at;
    int ahead_step = 0, stage = 0;
    const auto load_next = [&](int to_stage) {
      if (ahead.row < all.row_end) {
        unsigned char* const to = stages + to_stage * Traits::kStageBytes;
        const int64_t col = int64_t(ahead_step) * Traits::kDepth;
        load_async<Traits::kThreads>(TileA(to), p.anchors, int64_t(ahead.row) * kM, col);
        load_async<Traits::kThreads>(TileB(to + TileA::kBytes), p.keys, int64_t(ahead.col) * kN, col);
        if (++ahead_step == steps) {
          ahead_step = 0;
          ahead.next(all);
        }
      }
      ptx::cp_async_commit();
    };
    for (int i = 0; i < Traits::kStages - 1; ++i) load_next(i);

    // Logits whose temperature lies on the device are not known to be bounded.
    const T scale = kMaxima ? load_scale(p.scale) : p.scale.value;
    while (at.row < all.row_end) {
      // On its way during the first step.
      const int64_t label = fetch_label(at);
      T dots[F::kMI][F::kNI][4];
      set_zero(dots);
      for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<Traits::kStages - 2>();
        ptx::sync_threads();
        load_next(stage == 0 ? Traits::kStages - 1 : stage - 1);
        unsigned char* const ready = stages + stage * Traits::kStageBytes;
        Traits::Engine::multiply_transposed(f, dots, TileA(ready), TileB(ready + TileA::kBytes));
        stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
        if (step == 0) store_label(label);
      }
      if (steps == 1) ptx::sync_threads();

      const bool with_columns = p.symmetric && at.row != at.col;
      const int self = self_difference(p.has_self, p.self_offset, int64_t(at.row) * kM, int64_t(at.col) * kN);
      const bool masked = !labels.all_valid() || (self < kN && self > -kM);
      const F here = F::anew();
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
    ptx::cp_async_wait<0>();
  }
};

template <class Traits>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(Traits::kThreads, Traits::kMinBlocks)
    forward_kernel(typename Traits::Params params) {
  ForwardBlock<Traits>(params).run();
}

}  // namespace clce::cuda
