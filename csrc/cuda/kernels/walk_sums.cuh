// Partial sums of bounded logits over a walk of tiles, by row and by column.
//
// A tile's sums are folded over the lanes of each warp until one lane has one number, and added to a place of
// shared memory that this lane alone adds to: in a fixed order, without barriers. They stay there until the
// walk has left the row, or the column. Positives cost something only in tiles that hold one.
#pragma once

#include "cuda/kernels/logits.cuh"
#include "cuda/kernels/partial_sums.cuh"
#include "cuda/kernels/tile_sums.cuh"

namespace clce::cuda {

// kColumns: of the walk. Between additions and taking, and between taking and further additions, the block
// meets at a barrier.
template <class T, class F, int kColumns>
struct WalkSums {
  static constexpr int kFields = num_fields(false);
  // In place of the negatives' number, which is that of the pairs that are neither positive nor left out.
  static constexpr int kFLeftOut = kFNumNeg;
  static constexpr int kRowNumbers = F::kWarpsN * kFields * F::kM;
  static constexpr int kNumbers = kRowNumbers + F::kWarpsM * kFields * kColumns;
  static constexpr int kBytes = kNumbers * int(sizeof(T));
  static constexpr int kMI = F::kMI, kNI = F::kNI, kRowLines = 2 * kMI, kColumnLines = 2 * kNI;
  using Logits = T[kMI][kNI][4];
  static_assert(kRowLines <= 8 && kColumnLines <= 8, "a word counts the pairs of 8 lines in 4 bits each");

  T* rows;  // [kWarpsN][kFields][kM]
  T* cols;  // [kWarpsM][kFields][kColumns]

  CLCE_DEVICE explicit WalkSums(void* memory) : rows(static_cast<T*>(memory)), cols(rows + kRowNumbers) {}

  CLCE_DEVICE void clear() const {
    for (int i = int(threadIdx.x); i < kNumbers; i += F::kThreads) ptx::shared_store(rows + i, T(0));
  }

  // Adds all pairs as negatives; what is none has a dot product of -infinity. kByColumn: to the walk's
  // columns from `first` on, too.
  template <Exponentials kMode, bool kByColumn>
  CLCE_DEVICE void add_negatives(const F& f, const Logits& dots, T scale, T beta, int first) const {
    const T scale2 = scale * kLog2E<T>;
    T row_w[kRowLines], row_wn[kRowLines], col_w[kColumnLines], col_wn[kColumnLines];
#pragma unroll
    for (int line = 0; line < kColumnLines; ++line) {
#pragma unroll
      for (int i = 0; i < kRowLines; ++i) {
        const T dot = dot_at(dots, i, line);
        // The first of a sum is not added to 0.
        const auto add = [&](T x, T factor, T y) {
          row_w[i] = line == 0 ? x : row_w[i] + x;
          row_wn[i] = line == 0 ? factor * y : row_wn[i] + factor * y;
          if constexpr (kByColumn) {
            col_w[line] = i == 0 ? x : col_w[line] + x;
            col_wn[line] = i == 0 ? factor * y : col_wn[line] + factor * y;
          }
        };
        if constexpr (kMode == Exponentials::kOne) {
          const T x = exp2_of(dot * scale2);
          add(x, x, x);
        } else {
          add(exp2_of(dot * (scale2 * beta)), T(1), exp2_of(dot * (scale2 * (1 + beta))));
        }
      }
    }
    add_lines<ByRow<F>>(f, kFExpW, row_w, 0);
    add_lines<ByRow<F>>(f, kFExpWn, row_wn, 0);
    if constexpr (kByColumn) {
      add_lines<ByColumn<F>>(f, kFExpW, col_w, first);
      add_lines<ByColumn<F>>(f, kFExpWn, col_wn, first);
    }
  }

  // Adds the pairs for which maybe(row line, column line) and surely(...) hold, and leaves -infinity in place
  // of their dot products. Most have none even where the tile has one: they are asked maybe() alone.
  template <class Maybe, class Surely>
  CLCE_DEVICE void take_positives(const F& f, Logits& dots, T scale, bool by_column, int first, Maybe maybe,
                                  Surely surely) const {
    const T scale2 = scale * kLog2E<T>;
    uint32_t counts = 0;
    T sums[kRowLines], exps[kRowLines];
#pragma unroll
    for (int i = 0; i < kRowLines; ++i) sums[i] = exps[i] = 0;
#pragma unroll
    for (int line = 0; line < kColumnLines; ++line) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < kRowLines; ++i) any |= maybe(i, line);
      if (ptx::any_sync(any)) {
        T count = 0, sum = 0, exp = 0;
#pragma unroll
        for (int i = 0; i < kRowLines; ++i) {
          if (ptx::any_sync(maybe(i, line))) {
            const bool counted = maybe(i, line) && surely(i, line);
            T& dot = dot_at(dots, i, line);
            const T s = counted ? dot : T(0), x = counted ? exp2_of(dot * scale2) : T(0);
            counts += counted ? 1u << 4 * i : 0u;
            sums[i] += s;
            exps[i] += x;
            count += counted ? T(1) : T(0);
            sum += s;
            exp += x;
            dot = counted ? minus_infinity<T>() : dot;
          }
        }
        if (by_column) add_column(f, line, first, count, sum, exp);
      }
    }
    add_positive_rows(f, counts);
    add_lines<ByRow<F>>(f, kFSumPos, sums, 0);
    add_lines<ByRow<F>>(f, kFExpPos, exps, 0);
  }

  // Counts the pairs for which out(row line, column line) holds.
  template <class Out>
  CLCE_DEVICE void count_left_out(const F& f, bool by_column, int first, Out out) const {
    uint32_t by_row = 0, by_col = 0;
#pragma unroll
    for (int line = 0; line < kColumnLines; ++line) {
#pragma unroll
      for (int i = 0; i < kRowLines; ++i) {
        by_row += out(i, line) ? 1u << 4 * i : 0u;
        by_col += out(i, line) ? 1u << 4 * line : 0u;
      }
    }
    add_counts<ByRow<F>>(f, kFLeftOut, by_row, 0);
    if (by_column) add_counts<ByColumn<F>>(f, kFLeftOut, by_col, first);
  }

  // The sums of a row of the tile, or of a column of the walk, over `pairs` pairs; they are 0 again then.
  CLCE_DEVICE PartialSums<T> take_row(int row, T pairs, T scale, T beta) const {
    return take<F::kWarpsN, F::kM>(rows + row, pairs, scale, beta);
  }
  CLCE_DEVICE PartialSums<T> take_col(int col, T pairs, T scale, T beta) const {
    return take<F::kWarpsM, kColumns>(cols + col, pairs, scale, beta);
  }

 private:
  template <class Numbers>
  CLCE_DEVICE static auto& dot_at(Numbers& dots, int row_line, int col_line) {
    return dots[row_line / 2][col_line / 2][2 * (row_line % 2) + col_line % 2];
  }

  // The positives of one of the lane's columns.
  CLCE_DEVICE void add_column(const F& f, int line, int first, T count, T sum, T exp) const {
    using Side = ByColumn<F>;
    T v[] = {count, sum, exp};
    T* const to = cols + Side::share(f) * kFields * kColumns + first + Side::index(f, line);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      constexpr int kField[] = {kFNumPos, kFSumPos, kFExpPos};
#pragma unroll
      for (int mask = Side::kLast; mask <= Side::kFirst; mask *= 2) v[i] += ptx::shuffle_xor(v[i], mask);
      T* const place = to + kField[i] * kColumns;
      if (f.group == 0) ptx::shared_store(place, ptx::shared_load(place) + v[i]);
    }
  }

  // Of rows that are counted in 4 bits each: four to a word on their way between lanes.
  CLCE_DEVICE void add_positive_rows(const F& f, uint32_t counts) const {
    using Side = ByRow<F>;
    uint32_t even = counts & 0x0f0f0f0fu, odd = counts >> 4 & 0x0f0f0f0fu;
#pragma unroll
    for (int mask = Side::kLast; mask <= Side::kFirst; mask *= 2) {
      even += ptx::shuffle_xor(even, mask);
      odd += ptx::shuffle_xor(odd, mask);
    }
    const int line = 2 * f.pair;
    if (kRowLines < 8 && line >= kRowLines) return;
    T* const place = rows + (Side::share(f) * kFields + kFNumPos) * F::kM + Side::index(f, line);
    ptx::shared_store(place, ptx::shared_load(place) + T(even >> 4 * line & 255));
    ptx::shared_store(place + 8, ptx::shared_load(place + 8) + T(odd >> 4 * line & 255));
  }

  // The same of any lines, which are rare.
  template <class Side>
  CLCE_DEVICE void add_counts(const F& f, int field, uint32_t counts, int first_line) const {
    uint32_t v[Side::kLines];
#pragma unroll
    for (int i = 0; i < Side::kLines; ++i) v[i] = counts >> 4 * i & 15;
    add_lines<Side>(f, field, v, first_line);
  }

  // Adds the sums of the lanes' shares of each line to the line's place.
  template <class Side, class Number>
  CLCE_DEVICE void add_lines(const F& f, int field, Number (&v)[Side::kLines], int first_line) const {
    constexpr bool kRows = std::is_same_v<Side, ByRow<F>>;
    constexpr int kLanes = 2 * Side::kFirst / Side::kLast;
    constexpr int kKept = Side::kLines > kLanes ? Side::kLines / kLanes : 1;
    const int first = fold_lanes<Side::kFirst, Side::kLast, Side::kLines>(v, 4 * f.group + f.pair);
    if (Side::kLines < kLanes && first < 0) return;
    T* const to = (kRows ? rows : cols) + (Side::share(f) * kFields + field) * (kRows ? F::kM : kColumns);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      T* const place = to + first_line + Side::index(f, first + i);
      ptx::shared_store(place, ptx::shared_load(place) + T(v[i]));
    }
  }

  template <int kShares, int kLength>
  CLCE_DEVICE PartialSums<T> take(T* at, T pairs, T scale, T beta) const {
    T sums[kFields];
#pragma unroll
    for (int field = 0; field < kFields; ++field) {
      sums[field] = 0;
#pragma unroll
      for (int share = 0; share < kShares; ++share) {
        T* const place = at + (share * kFields + field) * kLength;
        sums[field] += ptx::shared_load(place);
        ptx::shared_store(place, T(0));
      }
    }
    PartialSums<T> result;
    result.n_pos = sums[kFNumPos];
    result.n_neg = pairs - sums[kFNumPos] - sums[kFLeftOut];
    result.sum_pos = sums[kFSumPos] * scale;
    result.exp_pos = sums[kFExpPos];
    // beta 0: e^(beta s) is 1, and e^((1 + beta) s) what has been added up first.
    result.exp_w = beta == 0 ? result.n_neg : sums[kFExpW];
    result.exp_wn = beta == 0 ? sums[kFExpW] : sums[kFExpWn];
    return result;
  }
};

}  // namespace clce::cuda
