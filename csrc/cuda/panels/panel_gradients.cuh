// A panel of dot products to dL/ds of its pairs, as the next product takes them.
//
// A lane has a few neighbouring columns, whose coefficients it keeps; a warp goes down the rows of a tile.
#pragma once

#include "cuda/kernels/coefficients.cuh"
#include "cuda/panels/panel.h"
#include "cuda/tile/half.cuh"
#include "dispatch.h"

namespace clce::cuda {

template <class Element, class T>
struct PanelGradientsParams {
  Panel panel;
  const T* dots;       // [panel rows][stride]
  Element* gradients;  // likewise; in the same place as dots where the types are the same
  int64_t stride;      // of both, a multiple of kRowPadding
  Side<Element, T> anchors, keys;
  Scale<T> scale;
  T beta;
  bool symmetric;  // only pairs with column > row, with the gradient of both; 0 for the others
  bool has_self;
  int64_t self_offset;
  const T* factors;  // the first multiplies dL/ds
};

template <class Element_, bool kUnbounded_>
struct PanelGradientsTraits {
  using Element = Element_;
  using T = AccumulationType<Element>;
  using Params = PanelGradientsParams<Element, T>;
  static constexpr bool kUnbounded = kUnbounded_;
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  // Unbounded logits in float64 need more registers than two blocks leave.
  static constexpr int kMinBlocks = kUnbounded && sizeof(T) == 8 ? 1 : 2;
  static constexpr int kVector = 16 / int(sizeof(T));  // columns of a lane
  static constexpr int kColumns = 32 * kVector, kRows = kColumns, kPlaces = kRows + kColumns;
  // Rows whose logits a warp has on their way at once.
  static constexpr int kBatch = 4;
  using LabelsOfTile = TileLabels<kPlaces>;
  static constexpr int kCoefficients = num_coefficients(kUnbounded);
  static constexpr int kLabelsAt = kCoefficients * kPlaces * int(sizeof(T));
  static constexpr int kSharedBytes = kLabelsAt + LabelsOfTile::kBytes;
  static_assert(kThreads >= kPlaces, "each row and each column of the tile has a thread");
  static_assert(kRowPadding % kVector == 0, "rows are whole vectors");
};

// A few numbers as they are stored side by side.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Neighbours {
  T values[kCount];
};

CLCE_DEVICE void convert(float from, ptx::bf16& to) {
  to = ptx::to_bf16(from);
}
CLCE_DEVICE void convert(float from, ptx::f16& to) {
  to = ptx::to_f16(from);
}
template <class T>
CLCE_DEVICE void convert(T from, T& to) {
  to = from;
}

template <class Traits>
struct PanelGradientsBlock {
  using Element = typename Traits::Element;
  using T = typename Traits::T;
  using Params = typename Traits::Params;
  using OneSide = Side<Element, T>;
  static constexpr int kVector = Traits::kVector, kCoefficients = Traits::kCoefficients;
  using Dots = Neighbours<T, kVector>;
  using Stored = Neighbours<Element, kVector>;

  // What a row or a column of the tile brings to its pairs.
  struct Line {
    T coefficients[kCoefficients];
    uint32_t low, high;  // of its label
    bool valid;
    CLCE_DEVICE T operator()(int i) const { return coefficients[i]; }
  };

  const Params& p;
  T* const coefficients;                       // [kCoefficients][kPlaces]
  const typename Traits::LabelsOfTile labels;  // places: the tile's rows, then its columns
  // Of the tile: its first row and column, and how many of them the panel has.
  const int64_t row, column;
  const int rows, columns;

  CLCE_DEVICE explicit PanelGradientsBlock(const Params& params)
      : p(params),
        coefficients(reinterpret_cast<T*>(ptx::dynamic_shared())),
        labels(ptx::dynamic_shared() + Traits::kLabelsAt),
        row(p.panel.row + int64_t(blockIdx.y) * Traits::kRows),
        column(p.panel.column + int64_t(blockIdx.x) * Traits::kColumns),
        rows(at_most(p.panel.row + p.panel.rows - row, Traits::kRows)),
        columns(at_most(p.panel.column + p.panel.columns - column, Traits::kColumns)) {}

  CLCE_DEVICE void store_line() const {
    const int t = int(threadIdx.x);
    if (t >= Traits::kPlaces) return;
    const bool is_row = t < Traits::kRows;
    const OneSide& side = is_row ? p.anchors : p.keys;
    const RowNumbers<T> numbers = fetch_row(side, is_row ? row + t : column + (t - Traits::kRows));
    labels.store(t, numbers.label, side.labels.none);
    const auto c = make_coefficients<Traits::kUnbounded>(numbers, p.beta, T(1));
#pragma unroll
    for (int i = 0; i < kCoefficients; ++i)
      ptx::shared_store(coefficients + i * Traits::kPlaces + t, c.values[i]);
  }

  CLCE_DEVICE Line load_line(int place) const {
    Line line;
#pragma unroll
    for (int i = 0; i < kCoefficients; ++i)
      line.coefficients[i] = ptx::shared_load(coefficients + i * Traits::kPlaces + place);
    line.low = ptx::shared_load(labels.low + place);
    line.high = ptx::shared_load(labels.high + place);
    line.valid = labels.is_valid(place);
    return line;
  }

  CLCE_DEVICE int64_t place(int r, int c) const {
    return (row - p.panel.row + r) * p.stride + (column - p.panel.column + c);
  }

  CLCE_DEVICE Dots load(int r, int c) const {
    Dots dots{};
    if (r >= rows || c >= columns) return dots;
    const T* const from = p.dots + place(r, c);
    if (c + kVector <= columns) return ptx::global_load(reinterpret_cast<const Dots*>(from));
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (c + k < columns) dots.values[k] = ptx::global_load(from + k);
    return dots;
  }

  // Whether the pair counts; the row with itself does not, nor what the other half of the panels counts.
  CLCE_DEVICE bool counts(int r, int c) const {
    const int64_t difference = column + c - (row + r);
    return p.symmetric ? difference > 0 : !p.has_self || difference != p.self_offset;
  }

  template <Exponentials kMode>
  CLCE_DEVICE void write(int c, const Line (&own)[kVector]) const {
    const T scale = load_scale(p.scale), factor = ptx::global_load(p.factors);
    constexpr int kStep = Traits::kWarps * Traits::kBatch;
    for (int first = int(threadIdx.x) / 32; first < rows; first += kStep) {
      Dots dots[Traits::kBatch];
#pragma unroll
      for (int i = 0; i < Traits::kBatch; ++i) dots[i] = load(first + i * Traits::kWarps, c);
#pragma unroll
      for (int i = 0; i < Traits::kBatch; ++i) {
        const int r = first + i * Traits::kWarps;
        if (r >= rows || c >= columns) continue;
        const Line line = load_line(r);
        Stored result;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const bool pair = line.valid && own[k].valid && counts(r, c + k);
          const bool same = line.low == own[k].low && line.high == own[k].high;
          const T gradient = logit_gradient<kMode>(dots[i].values[k], scale, pair && same, pair && !same,
                                                   line, own[k], p.beta);
          convert(pair ? gradient * factor : T(0), result.values[k]);
        }
        ptx::global_store(reinterpret_cast<Stored*>(p.gradients + place(r, c)), result);
      }
    }
  }

  CLCE_DEVICE void run() const {
    store_line();
    ptx::sync_threads();
    const int c = int(threadIdx.x) % 32 * kVector;
    Line own[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) own[k] = load_line(Traits::kRows + c + k);
    with_exponentials<Traits::kUnbounded>(p.beta, [&](auto mode) { write<decltype(mode)::value>(c, own); });
  }
};

template <class Traits>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(Traits::kThreads, Traits::kMinBlocks)
    panel_gradients_kernel(typename Traits::Params params) {
  PanelGradientsBlock<Traits>(params).run();
}

}  // namespace clce::cuda
