// The backward pass: each block owns some rows of the gradient and walks all rows of the other side.
//
//   gradient[i] = sum over j of dL/ds_ij other[j]
//
// dL/ds_ij holds what anchor i's statistics give and, in self-contrast, what anchor j's give. The same
// kernel makes the anchors' gradient (owner: anchors), the keys' (owner: keys) and self-contrast's.
// A block holds kDims columns of its rows' gradient in registers; wider gradients are cut into chunks
// (gridDim.y), each of which computes the logits anew. Where a row fits (kResident), the owner's rows stay in
// shared memory and each tile of the other side is read once, for both products; else both sides stream
// through shared memory in steps. gridDim.z blocks share the other side where there
// are few rows; reduce_kernel (reduce.cuh) adds up their shares.
#pragma once

#include <type_traits>

#include "cuda/kernels/coefficients.cuh"
#include "cuda/launch.cuh"

namespace clce::cuda {

template <class Element, class T>
struct BackwardParams {
  Side<Element, T> owner, other;
  Scale<T> scale;
  T beta;
  bool has_self;
  int64_t self_offset;  // the owner's row i is row i + self_offset of the other side
  int64_t dim;
  const T* grad_loss;  // [1] or null: 1
  const T* num_terms;  // [1] or null: 1
  T* gradient;         // [splits][owner rows][stride]
};

template <class Engine_, class Shape, bool kMaxima_>
struct BackwardTraits {
  using Engine = Engine_;
  using FS = typename Shape::Logits;     // [kM, kN]
  using FG = typename Shape::Gradients;  // [kM, kDims]
  using Element = typename Engine::Element;
  using T = typename Engine::Acc;
  using Params = BackwardParams<Element, T>;
  static constexpr bool kMaxima = kMaxima_;
  static constexpr int kM = FS::kM, kN = FS::kN, kDims = FG::kN;
  static constexpr int kDepth = Shape::kDepth, kStep = Shape::kStep, kStages = Shape::kStages;
  static constexpr int kThreads = FS::kThreads;
  // Coefficients of logits that are not bounded need more registers.
  static constexpr int kMinBlocks = kMaxima_ ? 1 : Shape::kMinBlocks;
  static constexpr bool kResident = Shape::kResident;
  using TileA = SharedTile<Element, kM, kDepth>;
  using TileB = SharedTile<Element, kN, kDepth>;
  using TileX = SharedTile<Element, kStep, kDims>;
  using TileG = SharedTile<typename Engine::Gradient, kM, kN>;
  using LabelsOfTile = TileLabels<kM + kN>;
  using C = Coefficients<kMaxima, T>;
  // float16 has few exponents: dL/ds is multiplied by a power of two before it is rounded.
  static constexpr bool kRescale = std::is_same_v<typename Engine::Gradient, ptx::f16>;
  static constexpr int kFirstBytes = TileB::kBytes + (kResident ? 0 : TileA::kBytes);
  static constexpr int kStageBytes = kResident || kFirstBytes > TileX::kBytes ? kFirstBytes : TileX::kBytes;
  static constexpr int kResidentBytes = kResident ? TileA::kBytes : 0;
  static constexpr int kCoefficientBytes = num_coefficients(kMaxima) * int(sizeof(T)) * (kM + kN);
  static constexpr int kGradientsAt = kStages * kStageBytes + kResidentBytes;
  static constexpr int kCoefficientsAt = kGradientsAt + TileG::kBytes;
  static constexpr int kLabelsAt = kCoefficientsAt + kCoefficientBytes;
  static constexpr int kSharesAt = kLabelsAt + LabelsOfTile::kBytes;
  static constexpr int kSharedBytes = kSharesAt + (kThreads / 32 + 1) * int(sizeof(T));
  static_assert(shared_fits(kSharedBytes, kMinBlocks), "every device since sm_80 can run it");
  static_assert(FG::kM == kM && FG::kThreads == kThreads, "the two products share threads and rows");
  static_assert(kN % kStep == 0 && kThreads >= kN && kThreads >= kM, "each row of a tile has a thread");
  static_assert(!kResident || (kDepth == kDims && kStep == kN), "a tile serves both products");
};

template <class Traits>
struct BackwardBlock {
  using Engine = typename Traits::Engine;
  using FS = typename Traits::FS;
  using FG = typename Traits::FG;
  using T = typename Traits::T;
  using C = typename Traits::C;
  using Params = typename Traits::Params;
  using TileA = typename Traits::TileA;
  using TileB = typename Traits::TileB;
  using TileX = typename Traits::TileX;
  using OneSide = Side<typename Traits::Element, T>;
  using Logits = T[FS::kMI][FS::kNI][4];
  using Gradients = T[FG::kMI][FG::kNI][4];
  static constexpr int kM = Traits::kM, kN = Traits::kN, kPlaces = kM + kN;
  static constexpr int kCoefficients = num_coefficients(Traits::kMaxima);

  const Params& p;
  const FS fs;
  const FG fg;
  unsigned char* const memory;
  const typename Traits::TileG g;
  T* const coefficients;                       // [kCoefficients][kPlaces]
  const typename Traits::LabelsOfTile labels;  // places: the owner's rows, then the tile's of the other side
  T* const shares;                             // [warps], then the unit

  int end;  // of the block's tiles of the other side
  // The next step to load.
  int ahead_tile, ahead_step = 0;
  int stage = 0;  // that is read next

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
        ahead_tile(first_tile(int(blockIdx.z))) {}

  // The block's part of the gradient.
  CLCE_DEVICE int64_t first_row() const { return int64_t(blockIdx.x) * kM; }
  CLCE_DEVICE int64_t first_dim() const { return int64_t(blockIdx.y) * Traits::kDims; }
  // Of the other side's tiles that share `share` of gridDim.z has.
  CLCE_DEVICE int first_tile(int share) const {
    return part_begin(uint32_t(ceil_div(p.other.rows.rows, kN)), gridDim.z, share);
  }

  // The steps of a tile: the first product's over the embedding, then the second's over the tile's rows; a
  // resident tile takes one.
  CLCE_DEVICE int first_steps() const { return int(ceil_div(p.owner.rows.stride, Traits::kDepth)); }

  CLCE_DEVICE void load_next(int to_stage) {
    if (ahead_tile < end) {
      unsigned char* const to = memory + to_stage * Traits::kStageBytes;
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
    ptx::cp_async_commit();
  }

  // Waits for the next step's data, and starts a load into the place of the last step's.
  CLCE_DEVICE unsigned char* next_stage() {
    ptx::cp_async_wait<Traits::kStages - 2>();
    ptx::sync_threads();
    load_next(stage == 0 ? Traits::kStages - 1 : stage - 1);
    unsigned char* const ready = memory + stage * Traits::kStageBytes;
    stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
    return ready;
  }

  CLCE_DEVICE void store_row(int place, const RowNumbers<T>& row, int64_t none) const {
    labels.store(place, row.label, none);
    const C c = make_coefficients<Traits::kMaxima>(row, p.beta, unit());
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

  // An upper bound of |dL/ds| over one side's rows, seen by every thread.
  CLCE_DEVICE T largest_gradient(const OneSide& side) const {
    T top = 0;
    if (side.derivatives) {
      const int64_t n = side.rows.rows;
      const auto size = [&](int i, int64_t row) {
        return std::abs(ptx::global_load(side.derivatives + i * n + row));
      };
      for (int64_t row = threadIdx.x; row < n; row += Traits::kThreads) {
        const T positive = size(kDSumPos, row) + size(kDLsePos, row);
        const T negative = size(kDLseW, row) * p.beta + size(kDLseWn, row) * (1 + p.beta);
        const T weight = side.weights ? std::abs(ptx::global_load(side.weights + row)) : T(1);
        const T bound = (positive > negative ? positive : negative) * weight;
        if (bound > top) top = bound;
      }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      const T theirs = ptx::shuffle_xor(top, mask);
      if (theirs > top) top = theirs;
    }
    ptx::sync_threads();
    if (threadIdx.x % 32 == 0) ptx::shared_store(shares + threadIdx.x / 32, top);
    ptx::sync_threads();
    for (int w = 0; w < Traits::kThreads / 32; ++w) {
      const T theirs = ptx::shared_load(shares + w);
      if (theirs > top) top = theirs;
    }
    return top;
  }

  // The power of two by which dL/ds is multiplied before it is rounded: none of them can overflow then, and
  // as few as possible underflow. Divided out at the end.
  CLCE_DEVICE T unit() const {
    if constexpr (Traits::kRescale) return ptx::shared_load(shares + Traits::kThreads / 32);
    return 1;
  }

  CLCE_DEVICE void find_unit() const {
    if constexpr (Traits::kRescale) {
      const T bound = largest_gradient(p.owner) + largest_gradient(p.other);
      T unit = 1;
      if (bound > 0 && bound < T(1e30)) {
        // 2^14 leaves a factor of almost 4 to the largest float16.
        const T exponent = T(14) - std::ceil(std::log2(bound));
        unit = std::exp2(exponent > 60 ? T(60) : exponent);
      }
      if (threadIdx.x == 0) ptx::shared_store(shares + Traits::kThreads / 32, unit);
      ptx::sync_threads();
    }
  }

  // The tile's dL/ds to shared memory.
  CLCE_DEVICE void write_gradients(const Logits& dots, int tile) const {
    const int self = self_difference(p.has_self, p.self_offset, first_row(), int64_t(tile) * kN);
    const bool masked = !labels.all_valid() || (self < kN && self > -kM);
    const FS here = FS::anew();
    Pairs<FS> pairs;
    classify(here, pairs, labels, masked, self);
    with_exponentials<Traits::kMaxima>(
        p.beta, [&](auto mode) { write_gradients_of<decltype(mode)::value>(here, dots, pairs); });
  }

  template <Exponentials kMode>
  CLCE_DEVICE void write_gradients_of(const FS& f, const Logits& dots, const Pairs<FS>& pairs) const {
    const T scale = this->scale();
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
          Engine::store_pair(g.at(f.row(mi, 2 * half), f.col(ni, 0)), pair[0], pair[1]);
        }
      }
    }
  }

  // Logits whose temperature lies on the device are not known to be bounded.
  CLCE_DEVICE T scale() const { return Traits::kMaxima ? load_scale(p.scale) : p.scale.value; }

  CLCE_DEVICE void run() {
    const int begin = ahead_tile;
    const TileA owner(memory + Traits::kStages * Traits::kStageBytes);
    if constexpr (Traits::kResident) load_async<Traits::kThreads>(owner, p.owner.rows, first_row(), 0);
    for (int i = 0; i < Traits::kStages - 1; ++i) load_next(i);

    find_unit();
    const int t = int(threadIdx.x);
    if (t < kM) store_row(t, fetch_row(p.owner, first_row() + t), p.owner.labels.none);

    Gradients sum;
    set_zero(sum);
    if constexpr (Traits::kResident) {
      load_other(begin);
      for (int tile = begin; tile < end; ++tile) {
        const TileB other(next_stage());
        Logits dots;
        set_zero(dots);
        Engine::multiply_transposed(FS::anew(), dots, owner, other);
        write_gradients(dots, tile);
        ptx::sync_threads();
        // Waits for memory while other warps multiply.
        if (tile + 1 < end) load_other(tile + 1);
        Engine::multiply(FG::anew(), sum, g, 0, other);
      }
    } else {
      const int steps = first_steps();
      for (int tile = begin; tile < end; ++tile) {
        Logits dots;
        set_zero(dots);
        for (int step = 0; step < steps; ++step) {
          unsigned char* const ready = next_stage();
          Engine::multiply_transposed(fs, dots, TileA(ready + TileB::kBytes), TileB(ready));
          if (step == 0) load_other(tile);
        }
        if (steps == 1) ptx::sync_threads();
        write_gradients(dots, tile);
        for (int step = 0; step < kN / Traits::kStep; ++step) {
          Engine::multiply(fg, sum, g, step * Traits::kStep, TileX(next_stage()));
        }
      }
    }
    ptx::cp_async_wait<0>();
    store(sum, scale() / unit());
  }

  CLCE_DEVICE void store(const Gradients& sum, T factor) const {
    const int64_t rows = p.owner.rows.rows, stride = p.owner.rows.stride;
    if (p.grad_loss) factor *= ptx::global_load(p.grad_loss);
    if (p.num_terms) {
      const T terms = ptx::global_load(p.num_terms);
      factor /= terms > 1 ? terms : T(1);
    }
    struct alignas(2 * sizeof(T)) Pair {
      T low, high;
    };
    const FG f = FG::anew();
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
          const Pair pair{col < p.dim ? sum[mi][ni][2 * half] * factor : T(0),
                          col + 1 < p.dim ? sum[mi][ni][2 * half + 1] * factor : T(0)};
          ptx::global_store(reinterpret_cast<Pair*>(gradient + row * stride + col), pair);
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
