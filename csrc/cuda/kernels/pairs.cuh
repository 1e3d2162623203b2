// Which pairs of a tile are positive and which are negative.
#pragma once

#include "cuda/kernels/labels.cuh"
#include "cuda/tile/fragment.cuh"

namespace clce::cuda {

// Column minus row, within a tile, of pairs of an anchor with itself; out of reach where there are none.
constexpr int kNoSelf = 1 << 20;

CLCE_DEVICE int self_difference(bool has_self, int64_t self_offset, int64_t first_row, int64_t first_col) {
  // 32 bits do: there are less than 2^32 rows.
  const uint32_t difference = uint32_t(first_row) + uint32_t(self_offset) - uint32_t(first_col);
  return has_self ? int(difference) : kNoSelf;
}

// One bit for each pair that a thread holds, in few registers.
template <class F>
struct PairBits {
  static constexpr int kPerRow = 4 * F::kNI;  // a piece of rows takes so many bits of one word
  static constexpr int kWords = (F::kMI * kPerRow + 31) / 32;
  static_assert(32 % kPerRow == 0, "a word holds whole rows of pieces");
  uint32_t words[kWords];

  CLCE_DEVICE static int place(int mi, int ni, int e) { return mi * kPerRow % 32 + 4 * ni + e; }
  CLCE_DEVICE static int word(int mi) { return mi * kPerRow / 32; }
  CLCE_DEVICE bool get(int mi, int ni, int e) const { return words[word(mi)] >> place(mi, ni, e) & 1; }

  CLCE_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }

  // holds(row, col): of the tile.
  template <class Holds>
  CLCE_DEVICE void fill(const F& f, Holds holds) {
    clear();
    // Not unrolled: all labels at once would need more registers than the logits leave.
#pragma unroll 1
    for (int ni = 0; ni < F::kNI; ++ni) {
#pragma unroll
      for (int mi = 0; mi < F::kMI; ++mi) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          words[word(mi)] |= holds(f.row(mi, e), f.col(ni, e)) ? 1u << place(mi, ni, e) : 0u;
        }
      }
    }
  }

  // The same in little code and few registers, pair by pair: for what is rare.
  template <class Holds>
  CLCE_DEVICE void fill_slowly(const F& f, Holds holds) {
    constexpr int kPieces = 32 / kPerRow;
    clear();
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
      for (int bit = 0; bit < 32 && bit < F::kMI * kPerRow; ++bit) {
        const int mi = word * kPieces + bit / kPerRow, ni = bit % kPerRow / 4;
        words[word] |= uint32_t(holds(f.row(mi, bit % 4), f.col(ni, bit % 4))) << bit;
      }
    }
  }
};

// The sign of each pair that a thread holds.
template <class F>
struct Pairs {
  PairBits<F> positive, negative;

  CLCE_DEVICE bool is_positive(int mi, int ni, int e) const { return positive.get(mi, ni, e); }
  CLCE_DEVICE bool is_negative(int mi, int ni, int e) const { return negative.get(mi, ni, e); }
  // Keeps the compiler from holding in registers what it has computed from the bits.
  CLCE_DEVICE void forget() {
#pragma unroll
    for (int i = 0; i < PairBits<F>::kWords; ++i) {
      positive.words[i] = ptx::opaque(positive.words[i]);
      negative.words[i] = ptx::opaque(negative.words[i]);
    }
  }
  // Leaves out the others.
  CLCE_DEVICE void keep(const PairBits<F>& counted) {
#pragma unroll
    for (int i = 0; i < PairBits<F>::kWords; ++i) {
      positive.words[i] &= counted.words[i];
      negative.words[i] &= counted.words[i];
    }
  }
  CLCE_DEVICE bool any_positive() const {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < PairBits<F>::kWords; ++i) any |= positive.words[i];
    return any != 0;
  }
};

// The tile's rows have places from 0 on, its columns from kM on. `masked`: some of them may not be valid, or
// some pair may be a row with itself (`self` is column minus row); without it fewer comparisons are made.
template <class F, class Labels>
CLCE_DEVICE void classify(const F& f, Pairs<F>& pairs, const Labels& labels, bool masked, int self) {
  constexpr int kWords = PairBits<F>::kWords;
  const auto equal = [](const uint32_t* half) {
    return [half](int row, int col) {
      return ptx::shared_load(half + row) == ptx::shared_load(half + F::kM + col);
    };
  };
  pairs.positive.fill(f, equal(labels.low));
  if (labels.any_wide()) {
    PairBits<F> upper;
    upper.fill(f, equal(labels.high));
#pragma unroll
    for (int i = 0; i < kWords; ++i) pairs.positive.words[i] &= upper.words[i];
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) pairs.negative.words[i] = ~pairs.positive.words[i];
  if (masked) {
    PairBits<F> counted;
    counted.fill(f, [&](int row, int col) {
      return labels.is_valid(row) && labels.is_valid(F::kM + col) && col - row != self;
    });
    pairs.keep(counted);
  }
}

}  // namespace clce::cuda
