// The backward pass: each block owns some rows of the gradient and walks all rows of the other side.
//
//   gradient[i] = sum over j of dL/ds_ij other[j]
//
// dL/ds_ij holds what anchor i's statistics give and, in self-contrast, what anchor j's give. The same
// kernel makes the anchors' gradient (owner: anchors), the keys' (owner: keys) and self-contrast's.
// A block holds kDims columns of its rows' gradient in registers; wider gradients are cut into chunks
// (gridDim.y), each of which computes the logits again. Where a row fits (kResident), the owner's rows stay
// in shared memory and each tile of the other side is read once, for both products; else both sides stream
// through shared memory in steps. gridDim.z blocks share the other side where there are few rows;
// reduce_kernel (reduce.cuh) adds up their shares.
#pragma once

#include <type_traits>

#include "cuda/grid.h"
#include "cuda/kernels/coefficients.cuh"
#include "cuda/kernels/pairs.cuh"
#include "cuda/kernels/unit.cuh"
#include "cuda/tile/pipeline.cuh"

namespace clce::cuda {

template <class Element, class T>
struct BackwardParams {
  Side<Element, T> owner, other;
  Scale<T> scale;
  T beta;
  bool has_self;
  int64_t self_offset;  // the owner's row i is row i + self_offset of the other side
  int64_t dim;
  const T* upstream;   // gradient of a loss that is one number, [1]; or null: 1
  const T* num_terms;  // [1] or null: 1
  T* gradient;         // [splits][owner rows][stride]
};

template <class Product_, class Shape, bool kUnbounded_>
struct BackwardTraits {
  using Product = Product_;
  using FS = typename Shape::Logits;     // [kM, kN]
  using FG = typename Shape::Gradients;  // [kM, kDims]
  using Element = typename Product::Element;
  using T = typename Product::Acc;
  using Params = BackwardParams<Element, T>;
  static constexpr bool kUnbounded = kUnbounded_;
  static constexpr int kM = FS::kM, kN = FS::kN, kDims = FG::kN;
  static constexpr int kDepth = Shape::kDepth, kStep = Shape::kStep;
  static constexpr int kThreads = FS::kThreads;
  // Unbounded logits need ten coefficients a row instead of four, and are the exception: their blocks may be
  // alone.
  static constexpr int kMinBlocks = kUnbounded ? 1 : Shape::kMinBlocks;
  static constexpr bool kResident = Shape::kResident;
  using TileA = SharedTile<Element, kM, kDepth>;
  using TileB = SharedTile<Element, kN, kDepth>;
  using TileX = SharedTile<Element, kStep, kDims>;
  using TileG = SharedTile<typename Product::Gradient, kM, kN>;
  using LabelsOfTile = TileLabels<kM + kN>;
  using C = Coefficients<kUnbounded, T>;
  static constexpr bool kRescale = std::is_same_v<typename Product::Gradient, ptx::f16>;
  static constexpr int kFirstBytes = TileB::kBytes + (kResident ? 0 : TileA::kBytes);
  static constexpr int kStageBytes = kResident || kFirstBytes > TileX::kBytes ? kFirstBytes : TileX::kBytes;
  using Ring = Pipeline<Shape::kStages, kStageBytes>;
  static constexpr int kResidentAt = Ring::kBytes, kResidentBytes = kResident ? TileA::kBytes : 0;
  static constexpr int kCoefficientBytes = num_coefficients(kUnbounded) * int(sizeof(T)) * (kM + kN);
  static constexpr int kGradientsAt = kResidentAt + kResidentBytes;
  static constexpr int kCoefficientsAt = kGradientsAt + TileG::kBytes;
  static constexpr int kLabelsAt = kCoefficientsAt + kCoefficientBytes;
  static constexpr int kSharesAt = kLabelsAt + LabelsOfTile::kBytes;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSharedBytes = kSharesAt + (kRescale ? 2 * kWarps + 1 : 0) * int(sizeof(T));
  static_assert(FG::kM == kM && FG::kThreads == kThreads, "the two products share threads and rows");
  static_assert(kN % kStep == 0 && kThreads >= kN && kThreads >= kM, "each row of a tile has a thread");
  static_assert(!kResident || (kDepth == kDims && kStep == kN), "a tile serves both products");
};

template <class Traits>
struct BackwardBlock {
  using Product = typename Traits::Product;
  using FS = typename Traits::FS;
  using FG = typename Traits::FG;
  using T = typename Traits::T;
  using C = typename Traits::C;
  using Params = typename Traits::Params;
  using TileA = typename Traits::TileA;
  using TileB = typename Traits::TileB;
  using TileX = typename Traits::TileX;
  using Logits = T[FS::kMI][FS::kNI][4];
  using Gradients = T[FG::kMI][FG::kNI][4];
  static constexpr int kM = Traits::kM, kN = Traits::kN, kPlaces = kM + kN;
  static constexpr int kCoefficients = num_coefficients(Traits::kUnbounded);

  const Params& p;
  const FS fs;
  const FG fg;
  unsigned char* const memory;
  const typename Traits::TileG g;
  T* const coefficients;                       // [kCoefficients][kPlaces]
  const typename Traits::LabelsOfTile labels;  // places: the owner's rows, then the tile's of the other side
  T* const shares;                             // float16: [kWarps][2], then the unit

  int end;  // of the block's tiles of the other side
  // The next step to load.
  int ahead_tile, ahead_step = 0;
  typename Traits::Ring ring;

  CLCE_DEVICE explicit BackwardBlock(const Params& params)
      : p(params),
        fs(),
        fg(),
        memory(ptx::dynamic_shared()),
        g(memory + Traits::kGradientsAt),
        coefficients(reinterpret_cast<T*>(memory + Traits::kCoefficientsAt)),
        labels(memory + Traits::kLabelsAt),
        shares(reinterpret_cast<T*>(memory + Traits::kSharesAt)),
        end(first_tile(int(blockIdx.z) + 1)),
        ahead_tile(first_tile(int(blockIdx.z))),
        ring(memory) {}

  // The block's part of the gradient.
  CLCE_DEVICE int64_t first_row() const { return int64_t(blockIdx.x) * kM; }
  CLCE_DEVICE int64_t first_dim() const { return int64_t(blockIdx.y) * Traits::kDims; }
  // Of the other side's tiles that share `share` of gridDim.z has.
  CLCE_DEVICE int first_tile(int share) const {
    return part_begin(uint32_t(ceil_div(p.other.rows.count, kN)), gridDim.z, share);
  }

  // The steps of a tile: the first product's over the embedding, then the second's over the tile's rows; a
  // resident tile takes one.
  CLCE_DEVICE int first_steps() const { return int(ceil_div(p.owner.rows.stride, Traits::kDepth)); }

  // The steps that the pipeline loads.
  CLCE_DEVICE bool left() const { return ahead_tile < end; }
  CLCE_DEVICE void load(unsigned char* to) {
    const int64_t row = int64_t(ahead_tile) * kN;
    if constexpr (Traits::kResident) {
      load_async<Traits::kThreads>(TileB(to), p.other.rows, row, 0);
      ++ahead_tile;
    } else {
      const int steps = first_steps();
      if (ahead_step < steps) {
        const int64_t col = int64_t(ahead_step) * Traits::kDepth;
        load_async<Traits::kThreads>(TileB(to), p.other.rows, row, col);
        load_async<Traits::kThreads>(TileA(to + TileB::kBytes), p.owner.rows, first_row(), col);
      } else {
        load_async<Traits::kThreads>(TileX(to), p.other.rows, row + (ahead_step - steps) * Traits::kStep,
                                     first_dim());
      }
      if (++ahead_step == steps + kN / Traits::kStep) {
        ahead_step = 0;
        ++ahead_tile;
      }
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
    if (t < kN) store_row(kM + t, fetch_row(p.other, int64_t(tile) * kN + t), p.other.labels.none);
  }

  // Reads a row's or a column's coefficients as they are needed: together they would take many registers.
  CLCE_DEVICE auto coefficients_of(int place) const {
    return [this, place](int i) { return ptx::shared_load(coefficients + i * kPlaces + place); };
  }

  // By which dL/ds is multiplied before it is rounded.
  CLCE_DEVICE T unit() const {
    if constexpr (Traits::kRescale) return ptx::shared_load(shares + 2 * Traits::kWarps);
    return 1;
  }

  CLCE_DEVICE void store_unit() const {
    if constexpr (Traits::kRescale) {
      const T unit = find_unit(p.owner, p.other, p.beta, Traits::kThreads, shares);
      if (threadIdx.x == 0) ptx::shared_store(shares + 2 * Traits::kWarps, unit);
      ptx::sync_threads();
    }
  }

  // The tile's dL/ds to shared memory.
  CLCE_DEVICE void write_gradients(const Logits& dots, int tile) const {
    const int self = self_difference(p.has_self, p.self_offset, first_row(), int64_t(tile) * kN);
    const bool masked = !labels.all_valid() || (self < kN && self > -kM);
    const FS here = FS::opaque();
    Pairs<FS> pairs;
    classify(here, pairs, labels, masked, self);
    with_exponentials<Traits::kUnbounded>(
        p.beta, [&](auto mode) { write_gradients_of<decltype(mode)::value>(here, dots, pairs); });
  }

  template <Exponentials kMode>
  CLCE_DEVICE void write_gradients_of(const FS& f, const Logits& dots, const Pairs<FS>& pairs) const {
    const T scale = load_scale<Traits::kUnbounded>(p.scale);
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
    const int begin = ahead_tile;
    const TileA owner(memory + Traits::kResidentAt);
    if constexpr (Traits::kResident) load_async<Traits::kThreads>(owner, p.owner.rows, first_row(), 0);
    ring.start(*this);

    store_unit();
    const int t = int(threadIdx.x);
    if (t < kM) store_row(t, fetch_row(p.owner, first_row() + t), p.owner.labels.none);

    Gradients sum;
    set_zero(sum);
    if constexpr (Traits::kResident) {
      load_other(begin);
      for (int tile = begin; tile < end; ++tile) {
        const TileB other(ring.next(*this));
        Logits dots;
        set_zero(dots);
        Product::multiply_transposed(FS::opaque(), dots, owner, other);
        write_gradients(dots, tile);
        ptx::sync_threads();
        // Waits for memory while other warps multiply.
        if (tile + 1 < end) load_other(tile + 1);
        Product::multiply(FG::opaque(), sum, g, 0, other);
      }
    } else {
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
        write_gradients(dots, tile);
        for (int step = 0; step < kN / Traits::kStep; ++step) {
          Product::multiply(fg, sum, g, step * Traits::kStep, TileX(ring.next(*this)));
        }
      }
    }
    ring.finish();
    store(sum, load_scale<Traits::kUnbounded>(p.scale) / unit());
  }

  CLCE_DEVICE void store(const Gradients& sum, T factor) const {
    const int64_t rows = p.owner.rows.count, stride = p.owner.rows.stride;
    factor = reduced(factor, p.upstream, p.num_terms);
    const FG f = FG::opaque();
    T* const gradient = p.gradient + int64_t(blockIdx.z) * rows * stride;
#pragma unroll
    for (int mi = 0; mi < FG::kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row() + f.row(mi, 2 * half);
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
  BackwardBlock<Traits>(params).run();
}

}  // namespace clce::cuda
