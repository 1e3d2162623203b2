// What the forward and the backward kernels share: which pairs of a tile are positive or negative, and
// the logits' scale.
#pragma once

#include <type_traits>

#include "cuda/tile/fragment.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "family/statistics.h"

namespace clce::cuda {

// How a tile pass takes its exponentials. Kernels are compiled for bounded logits, with both of the first,
// and for any.
enum class Exponentials {
  kOne,         // bounded logits, beta 0 or 1: e^s, of which e^(2 s) is the square
  kTwo,         // bounded logits, any beta
  kWithMaxima,  // any logits: shifted by running maxima, or by the statistics
};

constexpr bool needs_maxima(Exponentials mode) {
  return mode == Exponentials::kWithMaxima;
}

// Calls use(std::integral_constant<Exponentials, ...>).
template <bool kMaxima, class T, class Use>
CLCE_DEVICE void with_exponentials(T beta, Use use) {
  if constexpr (kMaxima) {
    use(std::integral_constant<Exponentials, Exponentials::kWithMaxima>{});
  } else if (beta == 0 || beta == 1) {
    use(std::integral_constant<Exponentials, Exponentials::kOne>{});
  } else {
    use(std::integral_constant<Exponentials, Exponentials::kTwo>{});
  }
}

template <class T>
constexpr T kLog2E = T(1.4426950408889634074);

CLCE_DEVICE float exp2_of(float x) {
  return ptx::exp2_fast(x);
}
CLCE_DEVICE double exp2_of(double x) {
  return std::exp2(x);
}

// s = dot / t, where sums are shifted by it: the passes must agree on it to the last bit.
template <class T>
CLCE_DEVICE T logit(T dot, T scale) {
  return rounded_product(dot, scale);
}

// A block may have 99 KiB of shared memory on sm_86 and sm_89, the least of all devices since sm_80; the most
// that blocks together may have is 228 KiB, of which each takes 1 KiB for itself (CUDA programming guide,
// technical specifications per compute capability).
constexpr bool shared_fits(int bytes, int blocks) {
  return bytes <= 99 * 1024 && blocks * (bytes + 1024) <= 228 * 1024;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Where part `part` of `parts` begins, if `count` things are cut evenly.
CLCE_DEVICE int part_begin(uint32_t count, uint32_t parts, uint32_t part) {
  const uint32_t longer = count % parts;
  return int(part * (count / parts) + (part < longer ? part : longer));
}

// Labels of one side: row r has labels[r / views], or r / views. There are less than 2^32 rows.
struct Labels {
  const int64_t* labels;
  int64_t rows;
  uint32_t views;
  // Given to rows that are neither anchor nor key: labelled so, or beyond the end.
  int64_t none;
};

inline Labels make_labels(const int64_t* labels, int64_t rows, int64_t views, int64_t ignore_index) {
  return {labels, rows, uint32_t(views), labels ? ignore_index : -1};
}

CLCE_DEVICE int64_t load_label(const Labels& side, int64_t row) {
  if (row >= side.rows) return side.none;
  const int64_t image = uint32_t(row) / side.views;
  return side.labels ? ptx::global_load(side.labels + image) : image;
}

// 1 / temperature, from the device if it lies there.
template <class T>
struct Scale {
  const T* temperature;
  T value;
};

template <class T>
CLCE_DEVICE T load_scale(const Scale<T>& scale) {
  return scale.temperature ? T(1) / ptx::global_load(scale.temperature) : scale.value;
}

// Column minus row, within a tile, of pairs of an anchor with itself; out of reach where there are none.
constexpr int kNoSelf = 1 << 20;

CLCE_DEVICE int self_difference(bool has_self, int64_t self_offset, int64_t first_row, int64_t first_col) {
  const int64_t difference = first_row + self_offset - first_col;
  return has_self && difference < kNoSelf && difference > -kNoSelf ? int(difference) : kNoSelf;
}

// The labels of a tile's rows and columns in shared memory: places 0 to kPlaces - 1, 32 to a group.
template <int kPlaces>
struct TileLabels {
  static constexpr int kGroups = kPlaces / 32;
  static constexpr int kBytes = 4 * (2 * kPlaces + 2 * kGroups);
  static_assert(kPlaces % 32 == 0, "a warp stores 32 labels at once");

  uint32_t *low, *high;  // halves of the labels: most labels differ or agree in the lower
  uint32_t* valid;       // per group, which are not `none`
  uint32_t* wide;        // per group, which have an upper half that the lower does not imply

  CLCE_DEVICE explicit TileLabels(void* memory)
      : low(static_cast<uint32_t*>(memory)),
        high(low + kPlaces),
        valid(high + kPlaces),
        wide(valid + kGroups) {}

  // By all lanes of a warp, for 32 places of one group.
  CLCE_DEVICE void store(int place, int64_t label, int64_t none) const {
    ptx::shared_store(low + place, uint32_t(label));
    ptx::shared_store(high + place, uint32_t(uint64_t(label) >> 32));
    const uint32_t valid_places = ptx::ballot(label != none);
    const uint32_t wide_places = ptx::ballot(label != int32_t(label));
    if (place % 32 == 0) {
      ptx::shared_store(valid + place / 32, valid_places);
      ptx::shared_store(wide + place / 32, wide_places);
    }
  }

  CLCE_DEVICE bool all_valid() const {
    uint32_t all = ~0u;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) all &= ptx::shared_load(valid + i);
    return all == ~0u;
  }

  CLCE_DEVICE bool any_wide() const {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) any |= ptx::shared_load(wide + i);
    return any != 0;
  }

  CLCE_DEVICE bool is_valid(int place) const {
    return ptx::shared_load(valid + place / 32) >> (place % 32) & 1;
  }
};

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

  // holds(row, col): of the tile.
  template <class Holds>
  CLCE_DEVICE void fill(const F& f, Holds holds) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
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
};

// The sign of each pair that a thread holds.
template <class F>
struct Pairs {
  PairBits<F> positive, negative;

  CLCE_DEVICE bool is_positive(int mi, int ni, int e) const { return positive.get(mi, ni, e); }
  CLCE_DEVICE bool is_negative(int mi, int ni, int e) const { return negative.get(mi, ni, e); }
  // What was made of the bits is not kept in registers.
  CLCE_DEVICE void forget() {
#pragma unroll
    for (int i = 0; i < PairBits<F>::kWords; ++i) {
      positive.words[i] = ptx::opaque(positive.words[i]);
      negative.words[i] = ptx::opaque(negative.words[i]);
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
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      pairs.positive.words[i] &= counted.words[i];
      pairs.negative.words[i] &= counted.words[i];
    }
  }
}

}  // namespace clce::cuda
