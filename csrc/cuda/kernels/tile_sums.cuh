// From a tile of dot products to partial sums, by row and by column.
#pragma once

#include <type_traits>

#include "cuda/kernels/logits.cuh"
#include "cuda/kernels/pairs.cuh"
#include "cuda/kernels/partial_sums.cuh"

namespace clce::cuda {

// Adds up kCount numbers per lane over the lanes that differ in bits kMask, kMask / 2, ..., kLast of their
// index. A lane ends with the sums of max(1, kCount / lanes) of the numbers, in v[0...]; the index of the
// first is returned, or -1 where another lane has the same.
template <int kMask, int kLast, int kCount, class T, int kN>
CLCE_DEVICE int fold_lanes(T (&v)[kN], int lane, int first = 0) {
  constexpr int kKept = kCount > 1 ? kCount / 2 : 1;
  const bool upper = (lane & kMask) != 0;
  if constexpr (kCount > 1) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const T keep = upper ? v[i + kKept] : v[i];
      const T give = upper ? v[i] : v[i + kKept];
      v[i] = keep + ptx::shuffle_xor(give, kMask);
    }
    if (upper && first >= 0) first += kKept;
  } else {
    v[0] += ptx::shuffle_xor(v[0], kMask);
    if (upper) first = -1;
  }
  if constexpr (kMask > kLast) first = fold_lanes<kMask / 2, kLast, kKept>(v, lane, first);
  return first;
}

// The larger; a NaN is dropped, and comes back by its exponential.
template <class T>
CLCE_DEVICE T larger(T a, T b) {
  return a > b || !(b == b) ? a : b;
}

// A thread's elements of a tile, sorted by row: of each of its kLines rows it has kAcross elements, and the
// lanes that have the others differ in the bits kFirst ... kLast of their index.
template <class F>
struct ByRow {
  static constexpr int kLines = 2 * F::kMI, kAcross = 2 * F::kNI, kFirst = 2, kLast = 1;
  static constexpr int kLength = F::kM, kShares = F::kWarpsN;  // rows of the tile; warps that share one
  CLCE_DEVICE static int index(const F& f, int line) { return f.row(line / 2, 2 * (line % 2)); }
  CLCE_DEVICE static int share(const F& f) { return f.warp_col; }
  // Calls use(mi, ni, e) for element i of a line.
  template <class Use>
  CLCE_DEVICE static auto at(int line, int i, Use use) {
    return use(line / 2, i / 2, 2 * (line % 2) + i % 2);
  }
};

// The same, by column.
template <class F>
struct ByColumn {
  static constexpr int kLines = 2 * F::kNI, kAcross = 2 * F::kMI, kFirst = 16, kLast = 4;
  static constexpr int kLength = F::kN, kShares = F::kWarpsM;
  CLCE_DEVICE static int index(const F& f, int line) { return f.col(line / 2, line % 2); }
  CLCE_DEVICE static int share(const F& f) { return f.warp_row; }
  template <class Use>
  CLCE_DEVICE static auto at(int line, int i, Use use) {
    return use(i / 2, line / 2, 2 * (i % 2) + line % 2);
  }
};

// One tile's sums in shared memory: by row for each warp column, by column for each warp row.
template <class T, class F, bool kUnbounded_>
struct TileSums {
  static constexpr bool kUnbounded = kUnbounded_;
  static constexpr int kFields = num_fields(kUnbounded);
  static constexpr int kBytes = int(sizeof(T)) * kFields * (F::kWarpsN * F::kM + F::kWarpsM * F::kN);
  static constexpr int kMI = F::kMI, kNI = F::kNI;
  using Logits = T[kMI][kNI][4];

  T* rows;  // [kWarpsN][kFields][kM]
  T* cols;  // [kWarpsM][kFields][kN]

  CLCE_DEVICE explicit TileSums(void* memory)
      : rows(static_cast<T*>(memory)), cols(rows + F::kWarpsN * kFields * F::kM) {}

  // `dots` are used up. Without `with_columns` only the rows' sums are made; without `masked` all pairs that
  // are not positive are negative, and their number is not kept.
  CLCE_DEVICE void write(const F& f, Logits& dots, Pairs<F> pairs, T scale, T beta, bool with_columns,
                         bool masked) const {
    const bool positives = ptx::any_sync(pairs.any_positive());
    const auto positive = [&](int mi, int ni, int e) { return pairs.is_positive(mi, ni, e); };
    const auto negative = [&](int mi, int ni, int e) { return pairs.is_negative(mi, ni, e); };
    if (positives) {
      sum(f, kFNumPos, with_columns,
          [&](int mi, int ni, int e) { return positive(mi, ni, e) ? T(1) : T(0); });
      pairs.forget();
      sum(f, kFSumPos, with_columns,
          [&](int mi, int ni, int e) { return positive(mi, ni, e) ? dots[mi][ni][e] * scale : T(0); });
      pairs.forget();
    } else {
      put_zero(f, kFNumPos, with_columns);
      put_zero(f, kFSumPos, with_columns);
      put_zero(f, kFExpPos, with_columns);
      if constexpr (kUnbounded) put_zero(f, kFMaxPos, with_columns);
    }
    if (masked) {
      sum(f, kFNumNeg, with_columns,
          [&](int mi, int ni, int e) { return negative(mi, ni, e) ? T(1) : T(0); });
      pairs.forget();
    }
    if constexpr (kUnbounded) {
      if (positives) write_shifted(f, dots, scale, with_columns, positive, kFMaxPos, kFExpPos, T(1));
      write_shifted(f, dots, scale, with_columns, negative, kFMaxNeg, kFExpW, beta);
      write_shifted(f, dots, scale, with_columns, negative, kFMaxNeg, kFExpWn, 1 + beta);
    } else {
      const T scale2 = scale * kLog2E<T>;
      if (positives) {
        sum(f, kFExpPos, with_columns, [&](int mi, int ni, int e) {
          return positive(mi, ni, e) ? exp2_of(dots[mi][ni][e] * scale2) : T(0);
        });
        pairs.forget();
      }
      if (beta == 0 || beta == 1) {
        // beta 0: the sum of e^s is exp_wn, and exp_w a count. beta 1: exp_w, and exp_wn the sum of squares.
        replace(dots, [&](int mi, int ni, int e) {
          return negative(mi, ni, e) ? exp2_of(dots[mi][ni][e] * scale2) : T(0);
        });
        sum(f, beta == 0 ? kFExpWn : kFExpW, with_columns,
            [&](int mi, int ni, int e) { return dots[mi][ni][e]; });
        if (beta == 0) return;
        sum(f, kFExpWn, with_columns,
            [&](int mi, int ni, int e) { return dots[mi][ni][e] * dots[mi][ni][e]; });
      } else {
        sum(f, kFExpW, with_columns, [&](int mi, int ni, int e) {
          return negative(mi, ni, e) ? exp2_of(dots[mi][ni][e] * (scale2 * beta)) : T(0);
        });
        pairs.forget();
        sum(f, kFExpWn, with_columns, [&](int mi, int ni, int e) {
          return negative(mi, ni, e) ? exp2_of(dots[mi][ni][e] * (scale2 * (1 + beta))) : T(0);
        });
      }
    }
  }

  CLCE_DEVICE PartialSums<T> row(int row, T beta, bool masked) const {
    return gather<ByRow<F>, kNI * 8>(rows, row, beta, masked);
  }
  CLCE_DEVICE PartialSums<T> col(int col, T beta, bool masked) const {
    return gather<ByColumn<F>, kMI * 16>(cols, col, beta, masked);
  }

 private:
  template <class Value>
  CLCE_DEVICE static void replace(Logits& x, Value value) {
#pragma unroll
    for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
      for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[mi][ni][e] = value(mi, ni, e);
      }
    }
  }

  // The selected logits' maxima, and the sums of e^(power (s - maximum)).
  template <class Selected>
  CLCE_DEVICE void write_shifted(const F& f, const Logits& dots, T scale, bool with_columns,
                                 Selected selected, int max_field, int exp_field, T power) const {
    write_shifted_along<ByRow<F>>(f, dots, scale, selected, max_field, exp_field, power);
    if (with_columns) {
      write_shifted_along<ByColumn<F>>(f, dots, scale, selected, max_field, exp_field, power);
    }
  }

  template <class Side, class Selected>
  CLCE_DEVICE void write_shifted_along(const F& f, const Logits& dots, T scale, Selected selected,
                                       int max_field, int exp_field, T power) const {
    T top[Side::kLines], sums[Side::kLines];
    maxima<Side>(top, dots, scale, selected);
    put<Side>(f, max_field, [&](int line) { return top[line]; });
#pragma unroll
    for (int line = 0; line < Side::kLines; ++line) {
      sums[line] = 0;
#pragma unroll
      for (int i = 0; i < Side::kAcross; ++i) {
        sums[line] += Side::at(line, i, [&](int mi, int ni, int e) {
          return selected(mi, ni, e) ? shifted_exp(dots[mi][ni][e], scale, top[line], power) : T(0);
        });
      }
    }
    fold_and_store<Side>(f, exp_field, sums);
  }

  // e^(power (s - top))
  CLCE_DEVICE static T shifted_exp(T dot, T scale, T top, T power) {
    return exp2_of((logit(dot, scale) - top) * (power * kLog2E<T>));
  }

  // Sums value(mi, ni, e) by row and by column at once: each value is made once and not kept.
  template <class Value>
  CLCE_DEVICE void sum(const F& f, int field, bool with_columns, Value value) const {
    T by_row[2 * kMI], by_col[2 * kNI];
#pragma unroll
    for (int i = 0; i < 2 * kNI; ++i) by_col[i] = 0;
#pragma unroll
    for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T sum = 0;
#pragma unroll
        for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const T x = value(mi, ni, 2 * half + b);
            sum += x;
            by_col[2 * ni + b] += x;
          }
        }
        by_row[2 * mi + half] = sum;
      }
    }
    fold_and_store<ByRow<F>>(f, field, by_row);
    if (with_columns) fold_and_store<ByColumn<F>>(f, field, by_col);
  }

  template <class Side>
  CLCE_DEVICE void fold_and_store(const F& f, int field, T (&v)[Side::kLines]) const {
    const int first = fold_lanes<Side::kFirst, Side::kLast, Side::kLines>(v, int(threadIdx.x) % 32);
    if (first < 0) return;
    constexpr int kLanes = 2 * Side::kFirst / Side::kLast;
    constexpr int kKept = Side::kLines > kLanes ? Side::kLines / kLanes : 1;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      ptx::shared_store(slot<Side>(f, field) + Side::index(f, first + i), v[i]);
    }
  }

  // Stores value(line), which all lanes of a line know.
  template <class Side, class Value>
  CLCE_DEVICE void put(const F& f, int field, Value value) const {
    if ((threadIdx.x & (2 * Side::kFirst - Side::kLast)) != 0) return;
#pragma unroll
    for (int line = 0; line < Side::kLines; ++line) {
      ptx::shared_store(slot<Side>(f, field) + Side::index(f, line), value(line));
    }
  }

  CLCE_DEVICE void put_zero(const F& f, int field, bool with_columns) const {
    put<ByRow<F>>(f, field, [](int) { return T(0); });
    if (with_columns) put<ByColumn<F>>(f, field, [](int) { return T(0); });
  }

  // Each line's largest logit among the selected, over the warp's part of it; 0 if none is.
  template <class Side, class Selected>
  CLCE_DEVICE static void maxima(T (&top)[Side::kLines], const Logits& dots, T scale, Selected selected) {
#pragma unroll
    for (int line = 0; line < Side::kLines; ++line) {
      T best = minus_infinity<T>();
#pragma unroll
      for (int i = 0; i < Side::kAcross; ++i) {
        Side::at(line, i, [&](int mi, int ni, int e) {
          if (selected(mi, ni, e)) best = larger(best, logit(dots[mi][ni][e], scale));
        });
      }
#pragma unroll
      for (int mask = Side::kLast; mask <= Side::kFirst; mask *= 2) {
        best = larger(best, ptx::shuffle_xor(best, mask));
      }
      top[line] = best == minus_infinity<T>() ? T(0) : best;
    }
  }

  template <class Side>
  CLCE_DEVICE T* slot(const F& f, int field) const {
    T* const first = std::is_same_v<Side, ByRow<F>> ? rows : cols;
    return first + (Side::share(f) * kFields + field) * Side::kLength;
  }

  // The warps' shares of row or column i of the tile, each over kPairs pairs, in their order.
  template <class Side, int kPairs>
  CLCE_DEVICE static PartialSums<T> gather(const T* shares, int i, T beta, bool masked) {
    PartialSums<T> sums;
#pragma unroll
    for (int w = 0; w < Side::kShares; ++w) {
      const auto stored = [&](int field) {
        return ptx::shared_load(shares + (w * kFields + field) * Side::kLength + i);
      };
      // What follows from the rest is not stored.
      const auto num_neg = [&] { return masked ? stored(kFNumNeg) : T(kPairs) - stored(kFNumPos); };
      combine(sums,
              partial_sums_from<T>(kUnbounded,
                                   [&](int field) {
                                     if (field == kFNumNeg || (field == kFExpW && !kUnbounded && beta == 0))
                                       return num_neg();
                                     return stored(field);
                                   }),
              kUnbounded, beta);
    }
    return sums;
  }
};

}  // namespace clce::cuda
