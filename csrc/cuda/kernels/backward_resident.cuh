// The backward pass of rows no wider than the gradient that a block holds, in 16 bits.
//
// Each warp owns some rows for the whole walk, in registers: their embeddings, which are the first product's
// operand, their gradient, and their coefficients. A tile of the other side serves both products; a warp goes
// over it in chunks of columns: logits, dL/ds, and, as accumulators lie where the next product's operand is
// taken from, the second product at once. Warps exchange nothing: one barrier per tile.
#pragma once

#include "cuda/kernels/backward.cuh"
#include "cuda/kernels/pairs.cuh"
#include "cuda/tile/pipeline.cuh"

namespace clce::cuda {

template <class Traits>
struct ResidentBlock;

template <class Product_, class Shape, bool kUnbounded_>
struct ResidentTraits {
  using Product = Product_;
  using Block = ResidentBlock<ResidentTraits>;
  using FG = typename Shape::Gradients;  // [kM, kDims]
  using Element = typename Product::Element;
  using T = typename Product::Acc;
  using Params = BackwardParams<Element, T>;
  static constexpr bool kUnbounded = kUnbounded_;
  static constexpr int kM = FG::kM, kN = Shape::Logits::kN, kDims = FG::kN;
  static constexpr int kThreads = FG::kThreads, kMinBlocks = Shape::kMinBlocks;
  // Columns of a tile that are logits at once: 16 a lane.
  static constexpr int kChunk = 32 / FG::kMI;
  using FS = Fragment<kM, kChunk, FG::kWarpsM, 1>;
  using OwnTile = SharedTile<Element, kM, kDims>;
  using Tile = SharedTile<Element, kN, kDims>;
  using Ring = Pipeline<Shape::kStages, Tile::kBytes>;
  using OwnNumbers = SideNumbers<kM, kUnbounded, T>;
  using OtherNumbers = SideNumbers<kN, kUnbounded, T>;
  static constexpr int kOwnAt = Ring::kBytes > OwnTile::kBytes ? Ring::kBytes : OwnTile::kBytes;
  static constexpr int kOtherAt = kOwnAt + OwnNumbers::kBytes;
  static constexpr int kScaleAt = kOtherAt + 2 * OtherNumbers::kBytes;
  static constexpr int kSharesAt = kScaleAt + int(sizeof(T)) + 8;
  static constexpr int kSharedBytes = kSharesAt + unit_bytes<Product>(kThreads);
  static_assert(FG::kWarpsN == 1 && Shape::Logits::kM == kM, "a warp owns whole rows");
  static_assert(kN % kChunk == 0 && kThreads >= kN && kThreads >= kM, "each row of a tile has a thread");
};

template <class Traits>
struct ResidentBlock : BackwardBlock<Traits> {
  using Base = BackwardBlock<Traits>;
  using Base::begin, Base::end, Base::first_row, Base::memory, Base::mine, Base::p, Base::unit;
  using Product = typename Traits::Product;
  using FS = typename Traits::FS;
  using FG = typename Traits::FG;
  using T = typename Traits::T;
  using Tile = typename Traits::Tile;
  using OtherNumbers = typename Traits::OtherNumbers;
  using Operand = typename Product::template Operand<FG>;
  using Logits = T[FS::kMI][FS::kNI][4];
  using Packed = Operand[FS::kNI / 2];
  static constexpr int kM = Traits::kM, kN = Traits::kN;

  const FS fs;
  const FG fg;
  const typename Traits::OwnNumbers own;
  // Of a lane's rows.
  ptx::Pair<T> own_negatives[FS::kMI][2];

  int ahead;  // the next tile to load
  typename Traits::Ring ring;

  CLCE_DEVICE explicit ResidentBlock(const typename Traits::Params& params)
      : Base(params), fs(), fg(), own(memory + Traits::kOwnAt), ahead(begin), ring(memory) {}

  // 1 / temperature, and what else the walk leaves no register for.
  CLCE_DEVICE T* scale_place() const { return reinterpret_cast<T*>(memory + Traits::kScaleAt); }
  CLCE_DEVICE T scale() const { return ptx::shared_load(scale_place()); }
  CLCE_DEVICE uint32_t* own_valid_place() const { return reinterpret_cast<uint32_t*>(scale_place() + 1); }
  CLCE_DEVICE uint32_t* first_row_place() const { return own_valid_place() + 1; }

  // Made where it is used: nothing of it takes registers in between.
  CLCE_DEVICE static FS here() { return FS(ptx::thread_again()); }

  // Two tiles' numbers are there at once: those of the next are written while those of one are read.
  CLCE_DEVICE OtherNumbers others(int tile) const {
    return OtherNumbers(memory + Traits::kOtherAt + tile % 2 * OtherNumbers::kBytes);
  }

  // The steps that the pipeline loads.
  CLCE_DEVICE bool left() const { return ahead < end; }
  CLCE_DEVICE void load(unsigned char* to) {
    load_async<Traits::kThreads>(Tile(to), mine.other.rows, int64_t(ahead) * kN, 0);
    ++ahead;
  }

  // Thread t's row of a tile of the other side; there are kN.
  CLCE_DEVICE void load_other(int tile) const {
    const int t = int(threadIdx.x);
    if (t >= kN) return;
    others(tile).store(t, fetch_row(mine.other, int64_t(tile) * kN + t), mine.other.labels.none, p.beta,
                       unit());
  }

  CLCE_DEVICE void load_own_numbers() {
#pragma unroll
    for (int mi = 0; mi < FS::kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = fs.row(mi, 2 * half);
        if constexpr (!Traits::kUnbounded) own_negatives[mi][half] = ptx::shared_load(own.negatives(row));
      }
    }
  }

  // Whether the lane has a pair whose labels' lower halves are equal: a positive one, most likely.
  CLCE_DEVICE bool any_alike(const OtherNumbers& other, int first) const {
    const FS f = here();
    bool any = false;
    uint32_t own_labels[FS::kMI][2];
#pragma unroll
    for (int mi = 0; mi < FS::kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        own_labels[mi][half] = ptx::shared_load(own.labels.low + f.row(mi, 2 * half));
      }
    }
#pragma unroll
    for (int ni = 0; ni < FS::kNI; ++ni) {
      const auto* const place =
          reinterpret_cast<const ptx::Pair<uint32_t>*>(other.labels.low + first + f.col(ni, 0));
      const ptx::Pair<uint32_t> label = ptx::shared_load(place);
#pragma unroll
      for (int mi = 0; mi < FS::kMI; ++mi) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          any |= own_labels[mi][half] == label.low || own_labels[mi][half] == label.high;
        }
      }
    }
    return any;
  }

  // dL/ds of a chunk, packed as the second product takes it. Bounded logits: without kPositives, all pairs
  // are negative.
  template <Exponentials kMode, bool kPositives>
  CLCE_DEVICE void write_pairs(const Logits& dots, const OtherNumbers& other, int first, Packed& w) const {
    const T scale = this->scale();
    const FS f = here();
#pragma unroll
    for (int ni = 0; ni < FS::kNI; ++ni) {
      ptx::Pack<T> columns{};
      if constexpr (kMode != Exponentials::kUnbounded) {
        columns = ptx::shared_load(other.negatives_of_two(first + f.col(ni, 0)));
      }
#pragma unroll
      for (int mi = 0; mi < FS::kMI; ++mi) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = f.row(mi, 2 * half);
          T pair[2];
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const int col = first + f.col(ni, b);
            const T dot = dots[mi][ni][2 * half + b];
            const auto agree = [&](const uint32_t* own_half, const uint32_t* other_half) {
              return ptx::shared_load(own_half + row) == ptx::shared_load(other_half + col);
            };
            const auto alike = [&] {
              return agree(own.labels.low, other.labels.low) && agree(own.labels.high, other.labels.high);
            };
            if constexpr (kMode == Exponentials::kUnbounded) {
              const bool positive = alike();
              pair[b] = logit_gradient<kMode>(dot, scale, positive, !positive, own.coefficients(row),
                                              other.coefficients(col), p.beta);
            } else {
              const ptx::Pair<T> mine = own_negatives[mi][half];
              pair[b] = negative_gradient_of<kMode>(exponent_of(dot, scale), mine.low + columns.values[2 * b],
                                                    mine.high + columns.values[2 * b + 1], p.beta);
              // Together, or each lane would have to ask for the numbers of a positive.
              if (kPositives && ptx::any_sync(agree(own.labels.low, other.labels.low))) {
                if (alike()) {
                  pair[b] = positive_gradient_of(exponent_of(dot, scale), own.coefficients(row),
                                                 other.coefficients(col));
                }
              }
            }
          }
          w[ni / 2][mi][ni % 2 * 2 + half] = Product::pack(pair[0], pair[1]);
        }
      }
    }
  }

  // Sets dL/ds to 0 where a row or a column is not valid and where a pair is a row with itself.
  CLCE_DEVICE void mask(const OtherNumbers& other, int first, int self, Packed& w) const {
    const FS f = here();
    const int row = f.row(0, 0), col = first + f.col(0, 0);
    const uint32_t rows = own.labels.valid_from(row), columns = other.labels.valid_from(col);
    const int self_here = self - (col - row);
#pragma unroll
    for (int ni = 0; ni < FS::kNI; ++ni) {
#pragma unroll
      for (int mi = 0; mi < FS::kMI; ++mi) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = 16 * mi + e / 2 * 8, c = 8 * ni + e % 2;
          if (!(rows >> r & columns >> c & 1) || c - r == self_here) {
            w[ni / 2][mi][ni % 2 * 2 + e / 2] &= e % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
          }
        }
      }
    }
  }

  // `masked`: some row or column may not be valid, or some pair may be a row with itself (`self` is column
  // minus row).
  CLCE_DEVICE void write_gradients(const Logits& dots, const OtherNumbers& other, int first, bool masked,
                                   int self, Packed& w) const {
    with_exponentials<Traits::kUnbounded>(p.beta, [&](auto mode) {
      constexpr Exponentials kMode = decltype(mode)::value;
      if constexpr (!Traits::kUnbounded) {
        if (!ptx::any_sync(any_alike(other, first))) return write_pairs<kMode, false>(dots, other, first, w);
      }
      write_pairs<kMode, true>(dots, other, first, w);
    });
    if (masked) mask(other, first, self, w);
  }

  CLCE_DEVICE void run() {
    const auto& owner = mine.owner;
    load_async<Traits::kThreads>(typename Traits::OwnTile(memory), owner.rows, first_row, 0);
    ptx::cp_async_commit();
    this->store_unit();
    const int t = int(threadIdx.x);
    if (t == 0) ptx::shared_store(scale_place(), load_scale(p.scale));
    if (t < kM) own.store(t, fetch_row(owner, first_row + t), owner.labels.none, p.beta, unit());
    load_other(begin);
    ptx::cp_async_wait<0>();
    ptx::sync_threads();
    Operand rows[Traits::kDims / 16];
    Product::load_rows(fg, rows, typename Traits::OwnTile(memory));
    load_own_numbers();
    const bool own_valid = own.labels.all_valid();
    if (t == 0) ptx::shared_store(own_valid_place(), uint32_t(own_valid));
    if (t == 0) ptx::shared_store(first_row_place(), uint32_t(first_row));
    // The tiles come to the place of the rows.
    ptx::sync_threads();
    ring.start(*this);

    typename Base::Gradients sum;
    set_zero(sum);
    for (int tile = begin; tile < end; ++tile) {
      const Tile ready(ring.next(*this));
      ptx::count_tile(1);
      if (tile + 1 < end) load_other(tile + 1);
      const OtherNumbers other = others(tile);
      const int self = self_difference(p.has_self, mine.self_offset, ptx::shared_load(first_row_place()),
                                       int64_t(tile) * kN);
      const bool all_valid = (ptx::shared_load(own_valid_place()) != 0) & other.labels.all_valid();
      const bool masked = !all_valid | (self < kN && self > -kM);
#pragma unroll 1
      for (int first = 0; first < kN; first += Traits::kChunk) {
        Logits dots;
        set_zero(dots);
        Product::multiply_rows_transposed(fs, dots, rows, ready, first);
        Packed w;
        write_gradients(dots, other, first, masked, self, w);
#pragma unroll
        for (int i = 0; i < FS::kNI / 2; ++i) Product::multiply_piece(fg, sum, w[i], ready, first + 16 * i);
      }
    }
    ring.finish();
    this->store(sum, scale());
  }
};

}  // namespace clce::cuda
