// The forward pass for logits that are not bounded: each tile's sums, with their maxima, go to shared memory
// and from there to the slots.
#pragma once

#include "cuda/kernels/forward_tiles.cuh"
#include "cuda/kernels/tile_sums.cuh"
#include "cuda/tile/pipeline.cuh"

namespace clce::cuda {

template <class Product_, class Shape>
struct UnboundedForwardTraits {
  using Product = Product_;
  using F = typename Shape::Logits;
  using T = typename Product::Acc;
  static constexpr int kBand = Shape::kBand;
  static constexpr int kDepth = Shape::kDepth, kThreads = F::kThreads;
  // Maxima need more registers, and are the exception: the blocks may be alone.
  static constexpr int kMinBlocks = 1;
  using Params = ForwardParams<typename Product::Element, T>;
  using TileA = SharedTile<typename Product::Element, F::kM, kDepth>;
  using TileB = SharedTile<typename Product::Element, F::kN, kDepth>;
  using Ring = Pipeline<Shape::kStages, TileA::kBytes + TileB::kBytes>;
  using Sums = TileSums<T, F, true>;
  static constexpr int kPlaces = F::kM + F::kN;
  using LabelsOfTile = TileLabels<kPlaces>;
  static constexpr int kSumsAt = Ring::kBytes, kLabelsAt = kSumsAt + Sums::kBytes;
  static constexpr int kSharedBytes = kLabelsAt + LabelsOfTile::kBytes;
  static_assert(F::kM == F::kN, "symmetric tiles are square");
  static_assert(kThreads >= kPlaces, "each row and each column of the tile has a thread");
};

template <class Traits>
struct UnboundedForwardBlock {
  using F = typename Traits::F;
  using T = typename Traits::T;
  using Params = typename Traits::Params;
  using Sums = typename Traits::Sums;
  using TileA = typename Traits::TileA;
  using TileB = typename Traits::TileB;
  static constexpr int kM = F::kM, kN = F::kN;

  const Params& p;
  const typename Traits::Product::template Reads<F, TileA, TileB> reads;
  unsigned char* const memory;
  const Sums sums;
  const typename Traits::LabelsOfTile labels;  // of the tile's rows, then of its columns

  CLCE_DEVICE explicit UnboundedForwardBlock(const Params& params)
      : p(params),
        reads(reads.kept()),
        memory(ptx::dynamic_shared()),
        sums(memory + Traits::kSumsAt),
        labels(memory + Traits::kLabelsAt) {}

  // Thread t has the label of the tile's row t, or column t - kM.
  CLCE_DEVICE bool has_label() const { return int(threadIdx.x) < Traits::kPlaces; }
  CLCE_DEVICE const Labels& label_side() const {
    return int(threadIdx.x) < kM ? p.anchor_labels : p.key_labels;
  }
  CLCE_DEVICE int64_t fetch_label(const TilePlace<Traits::kBand>& at) const {
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
    add_partial_sums(slot, p.anchors.count, /*unbounded=*/true, first, p.beta, value);
  }

  CLCE_DEVICE void run() const {
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) ptx::global_store(p.ticket, 0u);
    BlockSlots slots;
    const TileRectangle<Traits::kBand> all = block_tiles<Traits>(p, slots);
    TilePlace<Traits::kBand> at(all);
    const int steps = int(ceil_div(p.anchors.stride, Traits::kDepth));
    ForwardSteps<Traits> ahead(p, all);
    typename Traits::Ring ring(memory);
    ring.start(ahead);

    const T scale = load_scale(p.scale);
    while (at.is_within(all)) {
      // On its way during the first step.
      const int64_t label = fetch_label(at);
      T dots[F::kMI][F::kNI][4];
      set_zero(dots);
      for (int step = 0; step < steps; ++step) {
        unsigned char* const ready = ring.next(ahead);
        Traits::Product::multiply_transposed(reads, dots, TileA(ready), TileB(ready + TileA::kBytes));
        if (step == 0) store_label(label);
      }
      if (steps == 1) ptx::sync_threads();
      ptx::count_tile(steps);

      const bool with_columns = p.symmetric && at.row != at.col;
      const int self = self_difference(p.has_self, p.self_offset, int64_t(at.row) * kM, int64_t(at.col) * kN);
      const bool masked = !labels.all_valid() || (self < kN && self > -kM);
      const F here = F::opaque();
      Pairs<F> pairs;
      classify(here, pairs, labels, masked, self);
      sums.write(here, dots, pairs, scale, p.beta, with_columns, masked);
      ptx::sync_threads();

      const int t = int(threadIdx.x);
      const TilePlace<Traits::kBand> tile = at;
      at.next(all);
      if (t < kM) {
        // The first that the block adds to this row; in the diagonal's group it may have been a column
        // before.
        const bool first = tile.col == all.first_col(tile.row, all.col_begin) &&
                           (!all.triangular || tile.row == all.row_begin);
        add_to_slot(slots.row, int64_t(tile.row) * kM + t, first, sums.row(t, p.beta, masked));
      } else if (t < Traits::kPlaces && with_columns) {
        add_to_slot(slots.col, int64_t(tile.col) * kN + (t - kM), tile.row == all.row_begin,
                    sums.col(t - kM, p.beta, masked));
      }
    }
    ring.finish();
  }
};

}  // namespace clce::cuda
