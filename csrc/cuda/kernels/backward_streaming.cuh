// The backward pass of rows of any width: both sides stream through shared memory in steps, the first
// product's over the embedding's columns, then the second's over the tile's rows. Wider gradients than a
// block holds are cut into chunks (gridDim.y), each of which computes the logits again.
#pragma once

#include "cuda/kernels/backward.cuh"
#include "cuda/kernels/pairs.cuh"
#include "cuda/tile/pipeline.cuh"

namespace clce::cuda {

template <class Traits>
struct StreamingBlock;

template <class Product_, class Shape, bool kUnbounded_>
struct StreamingTraits {
  using Product = Product_;
  using Block = StreamingBlock<StreamingTraits>;
  using FS = typename Shape::Logits;     // [kM, kN]
  using FG = typename Shape::Gradients;  // [kM, kDims]
  using Element = typename Product::Element;
  using T = typename Product::Acc;
  using Params = BackwardParams<Element, T>;
  static constexpr bool kUnbounded = kUnbounded_;
  static constexpr int kM = FS::kM, kN = FS::kN;
  static constexpr int kDepth = Shape::kDepth, kStep = Shape::kStep;
  static constexpr int kThreads = FS::kThreads;
  // Unbounded logits need ten coefficients a row instead of four, and are the exception: their blocks may be
  // alone.
  static constexpr int kMinBlocks = kUnbounded ? 1 : Shape::kMinBlocks;
  using TileA = SharedTile<Element, kM, kDepth>;
  using TileB = SharedTile<Element, kN, kDepth>;
  using TileX = SharedTile<Element, kStep, FG::kN>;
  using TileG = SharedTile<typename Product::Gradient, kM, kN>;
  using LabelsOfTile = TileLabels<kM + kN>;
  using C = Coefficients<kUnbounded, T>;
  static constexpr int kFirstBytes = TileA::kBytes + TileB::kBytes;
  using Ring = Pipeline<Shape::kStages, (kFirstBytes > TileX::kBytes ? kFirstBytes : TileX::kBytes)>;
  static constexpr int kGradientsAt = Ring::kBytes;
  static constexpr int kCoefficientsAt = kGradientsAt + TileG::kBytes;
  static constexpr int kLabelsAt =
      kCoefficientsAt + num_coefficients(kUnbounded) * int(sizeof(T)) * (kM + kN);
  static constexpr int kSharesAt = kLabelsAt + LabelsOfTile::kBytes;
  static constexpr int kSharedBytes = kSharesAt + unit_bytes<Product>(kThreads);
  static_assert(FG::kM == kM && FG::kThreads == kThreads, "the two products share threads and rows");
  static_assert(kN % kStep == 0 && kThreads >= kN && kThreads >= kM, "each row of a tile has a thread");
};

template <class Traits>
struct StreamingBlock : BackwardBlock<Traits> {
  using Base = BackwardBlock<Traits>;
  using Base::begin, Base::end, Base::first_dim, Base::first_row, Base::memory, Base::mine, Base::p,
      Base::unit;
  using Product = typename Traits::Product;
  using FS = typename Traits::FS;
  using FG = typename Traits::FG;
  using T = typename Traits::T;
  using C = typename Traits::C;
  using TileA = typename Traits::TileA;
  using TileB = typename Traits::TileB;
  using TileX = typename Traits::TileX;
  using Logits = T[FS::kMI][FS::kNI][4];
  static constexpr int kM = Traits::kM, kN = Traits::kN, kPlaces = kM + kN;
  static constexpr int kCoefficients = num_coefficients(Traits::kUnbounded);

  const FS fs;
  const FG fg;
  const typename Traits::TileG g;
  T* const coefficients;                       // [kCoefficients][kPlaces]
  const typename Traits::LabelsOfTile labels;  // places: the owner's rows, then the tile's of the other side

  // The next step to load.
  int ahead_tile, ahead_step = 0;
  typename Traits::Ring ring;

  CLCE_DEVICE explicit StreamingBlock(const typename Traits::Params& params)
      : Base(params),
        fs(),
        fg(),
        g(memory + Traits::kGradientsAt),
        coefficients(reinterpret_cast<T*>(memory + Traits::kCoefficientsAt)),
        labels(memory + Traits::kLabelsAt),
        ahead_tile(begin),
        ring(memory) {}

  // Of the first product.
  CLCE_DEVICE int first_steps() const { return int(ceil_div(p.stride, Traits::kDepth)); }

  // The steps that the pipeline loads.
  CLCE_DEVICE bool left() const { return ahead_tile < end; }
  CLCE_DEVICE void load(unsigned char* to) {
    const int64_t row = int64_t(ahead_tile) * kN;
    const int steps = first_steps();
    if (ahead_step < steps) {
      const int64_t col = int64_t(ahead_step) * Traits::kDepth;
      load_async<Traits::kThreads>(TileB(to), mine.other.rows, row, col);
      load_async<Traits::kThreads>(TileA(to + TileB::kBytes), mine.owner.rows, first_row, col);
    } else {
      load_async<Traits::kThreads>(TileX(to), mine.other.rows, row + (ahead_step - steps) * Traits::kStep,
                                   first_dim());
    }
    if (++ahead_step == steps + kN / Traits::kStep) {
      ahead_step = 0;
      ++ahead_tile;
    }
  }

  CLCE_DEVICE void store_row(int place, const RowNumbers<T>& row, int64_t none) const {
    labels.store(place, row.label, none);
    const C c = make_coefficients<Traits::kUnbounded>(row, p.beta, unit());
#pragma unroll
    for (int i = 0; i < kCoefficients; ++i)
      ptx::shared_store(coefficients + i * kPlaces + place, c.values[i]);
  }
  // Thread t's row of a tile of the other side; there are kN.
  CLCE_DEVICE void load_other(int tile) const {
    const int t = int(threadIdx.x);
    if (t < kN) store_row(kM + t, fetch_row(mine.other, int64_t(tile) * kN + t), mine.other.labels.none);
  }

  // Reads a row's or a column's coefficients as they are needed: together they would take many registers.
  CLCE_DEVICE auto coefficients_of(int place) const {
    return [this, place](int i) { return ptx::shared_load(coefficients + i * kPlaces + place); };
  }

  // The tile's dL/ds to shared memory.
  CLCE_DEVICE void write_gradients(const Logits& dots, int tile) const {
    const int self = self_difference(p.has_self, mine.self_offset, first_row, int64_t(tile) * kN);
    const bool masked = !labels.all_valid() || (self < kN && self > -kM);
    const FS here = FS::opaque();
    Pairs<FS> pairs;
    classify(here, pairs, labels, masked, self);
    with_exponentials<Traits::kUnbounded>(
        p.beta, [&](auto mode) { write_gradients_of<decltype(mode)::value>(here, dots, pairs); });
  }

  template <Exponentials kMode>
  CLCE_DEVICE void write_gradients_of(const FS& f, const Logits& dots, const Pairs<FS>& pairs) const {
    const T scale = load_scale(p.scale);
#pragma unroll
    for (int ni = 0; ni < FS::kNI; ++ni) {
#pragma unroll
      for (int mi = 0; mi < FS::kMI; ++mi) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T pair[2];
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const int e = 2 * half + b;
            pair[b] = logit_gradient<kMode>(dots[mi][ni][e], scale, pairs.is_positive(mi, ni, e),
                                            pairs.is_negative(mi, ni, e), coefficients_of(f.row(mi, e)),
                                            coefficients_of(kM + f.col(ni, e)), p.beta);
          }
          Product::store_pair(g.at(f.row(mi, 2 * half), f.col(ni, 0)), pair[0], pair[1]);
        }
      }
    }
  }

  CLCE_DEVICE void run() {
    ring.start(*this);
    this->store_unit();
    const int t = int(threadIdx.x);
    if (t < kM) store_row(t, fetch_row(mine.owner, first_row + t), mine.owner.labels.none);

    typename Base::Gradients sum;
    set_zero(sum);
    const int steps = first_steps();
    for (int tile = begin; tile < end; ++tile) {
      Logits dots;
      set_zero(dots);
      for (int step = 0; step < steps; ++step) {
        unsigned char* const ready = ring.next(*this);
        Product::multiply_transposed(fs, dots, TileA(ready + TileB::kBytes), TileB(ready));
        if (step == 0) load_other(tile);
      }
      if (steps == 1) ptx::sync_threads();
      ptx::count_tile(steps);
      write_gradients(dots, tile);
      for (int step = 0; step < kN / Traits::kStep; ++step) {
        Product::multiply(fg, sum, g, step * Traits::kStep, TileX(ring.next(*this)));
      }
    }
    ring.finish();
    this->store(sum, load_scale(p.scale));
  }
};

}  // namespace clce::cuda
