// The forward pass: tiles of logits to partial sums per anchor.
//
// A block walks the tiles of a rectangle of anchors and keys and leaves, for each of its anchors, the
// sums over its keys in one scratch slot. In self-contrast the logits are symmetric: the rows are cut
// into G groups, block (P, Q), P <= Q, walks the tiles on and above the diagonal, and adds each tile to
// its rows (slot Q) and to its columns (slot P). Slot [q][field][row] is written by one block only, so
// nothing is added atomically and the bits never change.
//
// Bounded logits: the walk goes over bands of kBand columns of tiles, in each row by row, and its sums stay
// in shared memory: a slot is touched when the walk leaves a row or the band.
#pragma once

#include <type_traits>

#include "cuda/kernels/forward_tiles.cuh"
#include "cuda/kernels/forward_unbounded.cuh"
#include "cuda/kernels/walk_labels.cuh"
#include "cuda/kernels/walk_sums.cuh"
#include "cuda/tile/pipeline.cuh"

namespace clce::cuda {

template <class Product_, class Shape>
struct BoundedForwardTraits {
  using Product = Product_;
  using F = typename Shape::Logits;
  using T = typename Product::Acc;
  static constexpr int kBand = Shape::kBand;
  static constexpr int kDepth = Shape::kDepth, kThreads = F::kThreads, kMinBlocks = Shape::kMinBlocks;
  using Params = ForwardParams<typename Product::Element, T>;
  using TileA = SharedTile<typename Product::Element, F::kM, kDepth>;
  using TileB = SharedTile<typename Product::Element, F::kN, kDepth>;
  using Ring = Pipeline<Shape::kStages, TileA::kBytes + TileB::kBytes>;
  static constexpr int kColumns = kBand * F::kN;  // of a band
  using Sums = WalkSums<T, F, kColumns>;
  using LabelsOfWalk = WalkLabels<F, kColumns>;
  static constexpr int kSumsAt = Ring::kBytes, kLabelsAt = kSumsAt + Sums::kBytes;
  static constexpr int kSharedBytes = kLabelsAt + LabelsOfWalk::kBytes;
  static_assert(F::kM == F::kN, "symmetric tiles are square");
  static_assert(kThreads >= F::kM && kThreads % 32 == 0, "each row of the tile has a thread");
};

template <class Traits>
struct BoundedForwardBlock {
  using F = typename Traits::F;
  using T = typename Traits::T;
  using Params = typename Traits::Params;
  using Sums = typename Traits::Sums;
  using LabelsOfWalk = typename Traits::LabelsOfWalk;
  using TileA = typename Traits::TileA;
  using TileB = typename Traits::TileB;
  using Tiles = TileRectangle<Traits::kBand>;
  using Place = TilePlace<Traits::kBand>;
  using Dots = T[F::kMI][F::kNI][4];
  static constexpr int kM = F::kM, kN = F::kN;

  const Params& p;
  const typename Traits::Product::template Reads<F, TileA, TileB> reads;
  unsigned char* const memory;
  const Sums sums;
  const LabelsOfWalk labels;

  CLCE_DEVICE explicit BoundedForwardBlock(const Params& params)
      : p(params),
        reads(reads.kept()),
        memory(ptx::dynamic_shared()),
        sums(memory + Traits::kSumsAt),
        labels(memory + Traits::kLabelsAt) {}

  // What depends on it is computed where it is used, instead of staying in registers throughout.
  CLCE_DEVICE static int thread() { return int(ptx::opaque(threadIdx.x)); }

  CLCE_DEVICE void store_row_labels(int64_t row) const {
    const int t = thread();
    if (t < kM) labels.store_row(t, load_label(p.anchor_labels, row + t), p.anchor_labels.none);
  }
  CLCE_DEVICE void store_col_labels(int64_t col) const {
#pragma unroll
    for (int first = 0; first < Traits::kColumns; first += Traits::kThreads) {
      const int t = first + thread();
      if (Traits::kColumns % Traits::kThreads != 0 && t >= Traits::kColumns) return;
      labels.store_col(t, load_label(p.key_labels, col + t), p.key_labels.none);
    }
  }

  // Adds to what this block has put in the slot, or puts it there first.
  CLCE_DEVICE void add_to_slot(int64_t index, int64_t row, bool first, const PartialSums<T>& value) const {
    if (row >= p.anchors.count) return;
    T* const slot = p.slots + index * Sums::kFields * p.anchors.count + row;
    add_partial_sums(slot, p.anchors.count, /*unbounded=*/false, first, p.beta, value);
  }

  // What is neither positive nor negative gets a dot product of -infinity, and is counted.
  CLCE_DEVICE PairBits<F> leave_out(const F& f, Dots& dots, int first, int self, bool by_column) const {
    PairBits<F> out;
    out.fill_slowly(f, [&](int row, int col) {
      return !labels.is_valid_row(row) || !labels.is_valid_col(first + col) || col - row == self;
    });
#pragma unroll
    for (int mi = 0; mi < F::kMI; ++mi) {
#pragma unroll
      for (int ni = 0; ni < F::kNI; ++ni) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (out.get(mi, ni, e)) dots[mi][ni][e] = minus_infinity<T>();
        }
      }
    }
    sums.count_left_out(f, by_column, first, [&](int i, int line) { return get(out, i, line); });
    return out;
  }

  // Labels that agree in their lower halves only.
  CLCE_DEVICE void add_unlike(const F& f, PairBits<F>& bits, int64_t first_row, int64_t first_col) const {
    PairBits<F> unlike;
    unlike.fill_slowly(f, [&](int row, int col) {
      return load_label(p.anchor_labels, first_row + row) != load_label(p.key_labels, first_col + col);
    });
#pragma unroll
    for (int i = 0; i < PairBits<F>::kWords; ++i) bits.words[i] |= unlike.words[i];
  }

  // By the lines of ByRow and ByColumn.
  CLCE_DEVICE static bool get(const PairBits<F>& bits, int row_line, int col_line) {
    return bits.get(row_line / 2, col_line / 2, 2 * (row_line % 2) + col_line % 2);
  }

  // Whether the lane's part of the tile holds labels that agree in their lower halves.
  CLCE_DEVICE bool any_alike(const F& f, int first) const {
    uint32_t rows[2 * F::kMI], cols[2 * F::kNI];
    labels.load_rows(f, rows);
    labels.load_cols(f, first, cols);
    bool any = false;
#pragma unroll
    for (int i = 0; i < 2 * F::kMI; ++i) {
#pragma unroll
      for (int line = 0; line < 2 * F::kNI; ++line) any |= rows[i] == cols[line];
    }
    return any;
  }

  CLCE_DEVICE void take_positives(const F& f, Dots& dots, T scale, const PairBits<F>& not_positive, int first,
                                  bool by_column) const {
    uint32_t rows[2 * F::kMI], cols[2 * F::kNI];
    labels.load_rows(f, rows);
    labels.load_cols(f, first, cols);
    sums.take_positives(
        f, dots, scale, by_column, first, [&](int i, int line) { return rows[i] == cols[line]; },
        [&](int i, int line) { return !get(not_positive, i, line); });
  }

  CLCE_DEVICE void add_tile(Dots& dots, T scale, const Place& at) const {
    const F here = F::opaque();
    const int first = (at.col - at.band) * kN;
    const uint32_t first_row = uint32_t(at.row) * kM, first_col = uint32_t(at.col) * kN;
    const bool by_column = ((at.row ^ at.col) & -int(p.symmetric)) != 0;
    const int self = self_difference(p.has_self, p.self_offset, first_row, first_col);

    const bool alike = ptx::any_sync(any_alike(here, first));
    const uint32_t flags = labels.flags_of(here, first);
    const bool some_left_out = (flags & LabelsOfWalk::kNotAllValid) != 0 || (self < kN && self > -kM);
    if (alike || some_left_out) {
      PairBits<F> not_positive;
      not_positive.clear();
      if (some_left_out) not_positive = leave_out(F::opaque(), dots, first, self, by_column);
      if ((flags & LabelsOfWalk::kWide) != 0) add_unlike(F::opaque(), not_positive, first_row, first_col);
      take_positives(F::opaque(), dots, scale, not_positive, first, by_column);
    }
    with_exponentials<false>(p.beta, [&](auto mode) {
      constexpr Exponentials kMode = decltype(mode)::value;
      if (by_column) {
        sums.template add_negatives<kMode, true>(here, dots, scale, p.beta, first);
      } else {
        sums.template add_negatives<kMode, false>(here, dots, scale, p.beta, first);
      }
    });
  }

  CLCE_DEVICE void flush_row(const Place& at, const Tiles& all, int slot, T scale) const {
    const int t = thread();
    if (t >= kM) return;
    const T pairs = T((all.band_end(at.band) - all.first_col(at.row, at.band)) * kN);
    const bool first = all.first_col(at.row, all.col_begin) >= at.band;
    add_to_slot(slot, int64_t(at.row) * kM + t, first, sums.take_row(t, pairs, scale, p.beta));
  }

  CLCE_DEVICE void flush_cols(const Place& at, const Tiles& all, int slot, T scale) const {
    const int columns = (all.band_end(at.band) - at.band) * kN;
    for (int t = thread(); t < columns; t += Traits::kThreads) {
      const T pairs = T(all.rows_above(at.band + t / kN)) * T(kM);
      // In the diagonal's group its rows have been there before.
      add_to_slot(slot, int64_t(at.band) * kN + t, !all.triangular, sums.take_col(t, pairs, scale, p.beta));
    }
  }

  CLCE_DEVICE void run() const {
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) ptx::global_store(p.ticket, 0u);
    BlockSlots slots;
    const Tiles all = block_tiles<Traits>(p, slots);
    const int steps = int((uint32_t(p.anchors.stride) + Traits::kDepth - 1) / Traits::kDepth);
    ForwardSteps<Traits> ahead(p, all);
    typename Traits::Ring ring(memory);
    ring.start(ahead);

    sums.clear();
    const T scale = load_scale(p.scale);
    for (Place at(all); at.is_within(all); at.next(all)) {
      if (at.begins_row(all)) {
        store_row_labels(int64_t(at.row) * kM);
        if (at.row == all.row_begin) store_col_labels(int64_t(at.band) * kN);
      }
      Dots dots;
      const auto multiply = [&] {
        unsigned char* const ready = ring.next(ahead);
        Traits::Product::multiply_transposed(reads, dots, TileA(ready), TileB(ready + TileA::kBytes));
      };
      // The first step apart: its products are added to a constant 0, for which nothing has to be cleared.
      set_zero(dots);
      multiply();
      for (int step = 1; step < steps; ++step) multiply();
      ptx::count_tile(steps);
      add_tile(dots, scale, at);
      if (at.ends_row(all)) {
        ptx::sync_threads();
        flush_row(at, all, slots.row, scale);
        if (p.symmetric && at.ends_band(all)) {
          // In the diagonal's group the last row and its column have one slot.
          ptx::sync_threads();
          flush_cols(at, all, slots.col, scale);
        }
      }
    }
    ring.finish();
  }
};

template <class Product_, class Shape, bool kUnbounded_>
struct ForwardTraits : std::conditional_t<kUnbounded_, UnboundedForwardTraits<Product_, Shape>,
                                          BoundedForwardTraits<Product_, Shape>> {
  static constexpr bool kUnbounded = kUnbounded_;
  using Block = std::conditional_t<kUnbounded, UnboundedForwardBlock<ForwardTraits>,
                                   BoundedForwardBlock<ForwardTraits>>;
};

template <class Traits>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(Traits::kThreads, Traits::kMinBlocks)
    forward_kernel(typename Traits::Params params) {
  constexpr bool kUnbounded = Traits::kUnbounded;
  if (logits_are_unbounded(params.scale, params.beta, kUnbounded) != kUnbounded) return;
  typename Traits::Block block(params);
  block.run();
}

}  // namespace clce::cuda
