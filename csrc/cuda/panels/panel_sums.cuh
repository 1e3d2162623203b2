// A panel of dot products to partial sums: what panels have in place of the forward pass's product of tiles.
//
// A block reads one tile of the panel into registers, as if it had multiplied it there, and adds its sums by
// row, and in self-contrast by column, to slots of its own: slot x of the rows belongs to the tiles in column
// x of the panel, slot y of the columns to those in row y. Panels follow one another, so nothing is added
// atomically.
#pragma once

#include "cuda/kernels/tile_sums.cuh"
#include "cuda/panels/panel.h"
#include "cuda/tile/shared_tile.cuh"

namespace clce::cuda {

template <class T>
struct PanelSumsParams {
  Panel panel;
  const T* dots;    // [panel rows][stride]
  uint32_t stride;  // even
  Labels anchor_labels, key_labels;
  Scale<T> scale;
  T beta;
  bool symmetric;  // only pairs with column > row, each for both
  bool has_self;
  int64_t self_offset, num_anchors;
  T* slots;  // [row slots, then column slots][fields][num_anchors], 0 before the first panel
  int row_slots;
};

template <class T_, bool kUnbounded_>
struct PanelSumsTraits {
  using T = T_;
  using Params = PanelSumsParams<T>;
  // 32 logits a thread. (Twice as many in 128 x 128 would need a few registers more than the 128 of two
  // blocks.)
  using F = std::conditional_t<sizeof(T) == 8, Fragment<32, 32, 2, 2>, Fragment<64, 128, 2, 4>>;
  using Sums = TileSums<T, F, kUnbounded_>;
  using LabelsOfTile = TileLabels<F::kM + F::kN>;
  static constexpr bool kUnbounded = kUnbounded_;
  static constexpr int kPlaces = F::kM + F::kN;
  static constexpr int kThreads = F::kThreads, kMinBlocks = 2;
  static constexpr int kLabelsAt = Sums::kBytes, kSharedBytes = kLabelsAt + LabelsOfTile::kBytes;
  static_assert(kThreads >= kPlaces, "each row and each column of the tile has a thread");
};

template <class Traits>
struct PanelSumsBlock {
  using F = typename Traits::F;
  using T = typename Traits::T;
  using Params = typename Traits::Params;
  static constexpr int kM = F::kM, kN = F::kN;

  const Params& p;
  const typename Traits::Sums sums;
  const typename Traits::LabelsOfTile labels;  // of the tile's rows, then of its columns

  CLCE_DEVICE explicit PanelSumsBlock(const Params& params)
      : p(params), sums(ptx::dynamic_shared()), labels(ptx::dynamic_shared() + Traits::kLabelsAt) {}

  // The tile's first row and column, and how many of them the panel has: computed where they are used, as
  // registers are scarce.
  CLCE_DEVICE int64_t row() const { return p.panel.row + int64_t(blockIdx.y) * kM; }
  CLCE_DEVICE int64_t column() const { return p.panel.column + int64_t(blockIdx.x) * kN; }
  CLCE_DEVICE int rows() const { return at_most(p.panel.rows - int64_t(blockIdx.y) * kM, kM); }
  CLCE_DEVICE int columns() const { return at_most(p.panel.columns - int64_t(blockIdx.x) * kN, kN); }

  CLCE_DEVICE void load(const F& f, T (&dots)[F::kMI][F::kNI][4]) const {
    const T* const first = p.dots + blockIdx.y * uint32_t(kM) * p.stride + blockIdx.x * uint32_t(kN);
    const int num_rows = rows(), num_columns = columns();
#pragma unroll
    for (int mi = 0; mi < F::kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = f.row(mi, 2 * half);
#pragma unroll
        for (int ni = 0; ni < F::kNI; ++ni) {
          const int c = f.col(ni, 0);
          const T* const from = first + (uint32_t(r) * p.stride + uint32_t(c));
          ptx::Pair<T> pair{T(0), T(0)};
          if (r < num_rows && c + 1 < num_columns) {
            pair = ptx::global_load(reinterpret_cast<const ptx::Pair<T>*>(from));
          } else if (r < num_rows && c < num_columns) {
            pair.low = ptx::global_load(from);
          }
          dots[mi][ni][2 * half] = pair.low;
          dots[mi][ni][2 * half + 1] = pair.high;
        }
      }
    }
  }

  CLCE_DEVICE void store_label() const {
    const int t = int(threadIdx.x);
    if (t >= Traits::kPlaces) return;
    const Labels& side = t < kM ? p.anchor_labels : p.key_labels;
    const int i = t < kM ? t : t - kM;
    const bool within = i < (t < kM ? rows() : columns());
    labels.store(t, within ? load_label(side, (t < kM ? row() : column()) + i) : side.none, side.none);
  }

  CLCE_DEVICE void add_to_slot(int index, int64_t anchor, const PartialSums<T>& value) const {
    T* const slot = p.slots + int64_t(index) * Traits::Sums::kFields * p.num_anchors + anchor;
    add_partial_sums(slot, p.num_anchors, Traits::kUnbounded, /*first=*/false, p.beta, value);
  }

  CLCE_DEVICE void run() const {
    const int64_t above = column() - row();  // of the tile's first pair, column less row
    if (p.symmetric && above + columns() - 1 <= 0) return;
    T dots[F::kMI][F::kNI][4];
    load(F::opaque(), dots);
    store_label();
    ptx::sync_threads();

    const int self = self_difference(p.has_self, p.self_offset, row(), column());
    const bool on_diagonal = p.symmetric && above < rows();
    const bool masked = !labels.all_valid() || on_diagonal || (self < kN && self > -kM);
    const F here = F::opaque();
    Pairs<F> pairs;
    classify(here, pairs, labels, masked, self);
    if (on_diagonal) {
      PairBits<F> counted;
      counted.fill(here, [&](int r, int c) { return c + above > r; });
      pairs.keep(counted);
    }
    sums.write(here, dots, pairs, load_scale(p.scale), p.beta, p.symmetric, masked);
    ptx::sync_threads();

    const int t = int(threadIdx.x);
    if (t < rows()) add_to_slot(int(blockIdx.x), row() + t, sums.row(t, p.beta, masked));
    if (p.symmetric && t >= kM && t - kM < columns()) {
      add_to_slot(p.row_slots + int(blockIdx.y), column() + (t - kM), sums.col(t - kM, p.beta, masked));
    }
  }
};

template <class Traits>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(Traits::kThreads, Traits::kMinBlocks)
    panel_sums_kernel(typename Traits::Params params) {
  PanelSumsBlock<Traits>(params).run();
}

}  // namespace clce::cuda
