// From a tile of dot products to partial sums, by row and by column.
#pragma once

#include "cuda/kernels/common.cuh"

namespace clce::cuda {

// Numbers per anchor in shared memory and in the scratch slots; those with maxima keep all eight.
enum Field : int { kFNumPos, kFNumNeg, kFSumPos, kFExpPos, kFExpW, kFExpWn, kFMaxPos, kFMaxNeg };

constexpr int num_fields(bool maxima) {
  return maxima ? 8 : 6;
}

template <class T>
CLCE_DEVICE PartialSums<T> load_partial(const T* first, int64_t field_stride, bool maxima) {
  const auto load = [&](int field) { return ptx::global_load(first + field * field_stride); };
  PartialSums<T> sums;
  sums.n_pos = load(kFNumPos);
  sums.n_neg = load(kFNumNeg);
  sums.sum_pos = load(kFSumPos);
  sums.exp_pos = load(kFExpPos);
  sums.exp_w = load(kFExpW);
  sums.exp_wn = load(kFExpWn);
  if (maxima) {
    sums.max_pos = load(kFMaxPos);
    sums.max_neg = load(kFMaxNeg);
  }
  return sums;
}

template <class T>
CLCE_DEVICE void store_partial(T* first, int64_t field_stride, bool maxima, const PartialSums<T>& sums) {
  const auto store = [&](int field, T value) { ptx::global_store(first + field * field_stride, value); };
  store(kFNumPos, sums.n_pos);
  store(kFNumNeg, sums.n_neg);
  store(kFSumPos, sums.sum_pos);
  store(kFExpPos, sums.exp_pos);
  store(kFExpW, sums.exp_w);
  store(kFExpWn, sums.exp_wn);
  if (maxima) {
    store(kFMaxPos, sums.max_pos);
    store(kFMaxNeg, sums.max_neg);
  }
}

template <class T>
CLCE_DEVICE void combine(PartialSums<T>& into, const PartialSums<T>& from, bool maxima, T beta) {
  if (maxima) {
    merge(into, from, beta);
    return;
  }
  into.n_pos += from.n_pos;
  into.n_neg += from.n_neg;
  into.sum_pos += from.sum_pos;
  into.exp_pos += from.exp_pos;
  into.exp_w += from.exp_w;
  into.exp_wn += from.exp_wn;
}

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

// One tile's sums in shared memory: by row for each warp column, by column for each warp row.
template <class T, class F, bool kMaxima_>
struct TileSums {
  static constexpr bool kMaxima = kMaxima_;
  static constexpr int kFields = num_fields(kMaxima);
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
      if constexpr (kMaxima) put_zero(f, kFMaxPos, with_columns);
    }
    if (masked) {
      sum(f, kFNumNeg, with_columns,
          [&](int mi, int ni, int e) { return negative(mi, ni, e) ? T(1) : T(0); });
      pairs.forget();
    }
    if constexpr (kMaxima) {
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
    return gather<F::kWarpsN, F::kM, kNI * 8>(rows, row, beta, masked);
  }
  CLCE_DEVICE PartialSums<T> col(int col, T beta, bool masked) const {
    return gather<F::kWarpsM, F::kN, kMI * 16>(cols, col, beta, masked);
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
    T top[kMI][2];
    row_maxima(top, dots, scale, selected);
    put_rows(f, max_field, [&](int mi, int half) { return top[mi][half]; });
    sum_rows(f, exp_field, [&](int mi, int ni, int e) {
      return selected(mi, ni, e) ? shifted_exp(dots[mi][ni][e], scale, top[mi][e / 2], power) : T(0);
    });
    if (!with_columns) return;
    T col_top[kNI][2];
    col_maxima(col_top, dots, scale, selected);
    put_cols(f, max_field, [&](int ni, int b) { return col_top[ni][b]; });
    sum_cols(f, exp_field, [&](int mi, int ni, int e) {
      return selected(mi, ni, e) ? shifted_exp(dots[mi][ni][e], scale, col_top[ni][e & 1], power) : T(0);
    });
  }

  // e^(power (dot scale - top))
  CLCE_DEVICE static T shifted_exp(T dot, T scale, T top, T power) {
    return exp2_of((dot * scale - top) * (power * kLog2E<T>));
  }

  // Sums value(mi, ni, e) by row, over the warp's columns.
  template <class Value>
  CLCE_DEVICE void sum_rows(const F& f, int field, Value value) const {
    T v[2 * kMI];
#pragma unroll
    for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T sum = 0;
#pragma unroll
        for (int ni = 0; ni < kNI; ++ni) {
          sum += value(mi, ni, 2 * half);
          sum += value(mi, ni, 2 * half + 1);
        }
        v[2 * mi + half] = sum;
      }
    }
    fold_and_store_rows(f, field, v);
  }

  template <class Value>
  CLCE_DEVICE void sum_cols(const F& f, int field, Value value) const {
    T v[2 * kNI];
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        T sum = 0;
#pragma unroll
        for (int mi = 0; mi < kMI; ++mi) {
          sum += value(mi, ni, b);
          sum += value(mi, ni, b + 2);
        }
        v[2 * ni + b] = sum;
      }
    }
    fold_and_store_cols(f, field, v);
  }

  // Both at once: each value is made once and not kept.
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
    fold_and_store_rows(f, field, by_row);
    if (with_columns) fold_and_store_cols(f, field, by_col);
  }

  CLCE_DEVICE void fold_and_store_rows(const F& f, int field, T (&v)[2 * kMI]) const {
    const int first = fold_lanes<2, 1, 2 * kMI>(v, int(threadIdx.x) % 32);
    if (first < 0) return;
    constexpr int kKept = kMI >= 2 ? kMI / 2 : 1;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int mi = (first + i) / 2, half = (first + i) % 2;
      ptx::shared_store(row_slot(f, field) + f.row(mi, 2 * half), v[i]);
    }
  }

  CLCE_DEVICE void fold_and_store_cols(const F& f, int field, T (&v)[2 * kNI]) const {
    const int first = fold_lanes<16, 4, 2 * kNI>(v, int(threadIdx.x) % 32);
    if (first < 0) return;
    constexpr int kKept = kNI >= 4 ? kNI / 4 : 1;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int ni = (first + i) / 2, b = (first + i) % 2;
      ptx::shared_store(col_slot(f, field) + f.col(ni, b), v[i]);
    }
  }

  // Stores what all lanes of a row, or of a column, know.
  template <class Value>
  CLCE_DEVICE void put_rows(const F& f, int field, Value value) const {
    if (f.pair != 0) return;
#pragma unroll
    for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::shared_store(row_slot(f, field) + f.row(mi, 2 * half), value(mi, half));
      }
    }
  }

  template <class Value>
  CLCE_DEVICE void put_cols(const F& f, int field, Value value) const {
    if (f.group != 0) return;
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
      for (int b = 0; b < 2; ++b) ptx::shared_store(col_slot(f, field) + f.col(ni, b), value(ni, b));
    }
  }

  CLCE_DEVICE void put_zero(const F& f, int field, bool with_columns) const {
    put_rows(f, field, [](int, int) { return T(0); });
    if (with_columns) put_cols(f, field, [](int, int) { return T(0); });
  }

  // Each row's largest logit among the selected, over the warp's columns; 0 if none is.
  template <class Selected>
  CLCE_DEVICE static void row_maxima(T (&top)[kMI][2], const Logits& dots, T scale, Selected selected) {
#pragma unroll
    for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T best = minus_infinity<T>();
#pragma unroll
        for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            if (selected(mi, ni, 2 * half + b)) best = larger(best, dots[mi][ni][2 * half + b] * scale);
          }
        }
        best = larger(best, ptx::shuffle_xor(best, 1));
        best = larger(best, ptx::shuffle_xor(best, 2));
        top[mi][half] = best == minus_infinity<T>() ? T(0) : best;
      }
    }
  }

  template <class Selected>
  CLCE_DEVICE static void col_maxima(T (&top)[kNI][2], const Logits& dots, T scale, Selected selected) {
#pragma unroll
    for (int ni = 0; ni < kNI; ++ni) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        T best = minus_infinity<T>();
#pragma unroll
        for (int mi = 0; mi < kMI; ++mi) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (selected(mi, ni, 2 * half + b)) best = larger(best, dots[mi][ni][2 * half + b] * scale);
          }
        }
        best = larger(best, ptx::shuffle_xor(best, 4));
        best = larger(best, ptx::shuffle_xor(best, 8));
        best = larger(best, ptx::shuffle_xor(best, 16));
        top[ni][b] = best == minus_infinity<T>() ? T(0) : best;
      }
    }
  }

  CLCE_DEVICE T* row_slot(const F& f, int field) const {
    return rows + (f.warp_col * kFields + field) * F::kM;
  }
  CLCE_DEVICE T* col_slot(const F& f, int field) const {
    return cols + (f.warp_row * kFields + field) * F::kN;
  }

  // The warps' shares of row or column i, each over kPairs pairs, in their order.
  template <int kShares, int kLength, int kPairs>
  CLCE_DEVICE static PartialSums<T> gather(const T* shares, int i, T beta, bool masked) {
    PartialSums<T> sums;
#pragma unroll
    for (int w = 0; w < kShares; ++w) {
      const auto load = [&](int field) {
        return ptx::shared_load(shares + (w * kFields + field) * kLength + i);
      };
      PartialSums<T> share;
      share.n_pos = load(kFNumPos);
      share.n_neg = masked ? load(kFNumNeg) : T(kPairs) - share.n_pos;
      share.sum_pos = load(kFSumPos);
      share.exp_pos = load(kFExpPos);
      share.exp_w = !kMaxima && beta == 0 ? share.n_neg : load(kFExpW);
      share.exp_wn = load(kFExpWn);
      if constexpr (kMaxima) {
        share.max_pos = load(kFMaxPos);
        share.max_neg = load(kFMaxNeg);
      }
      combine(sums, share, kMaxima, beta);
    }
    return sums;
  }
};

}  // namespace clce::cuda
