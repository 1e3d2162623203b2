// Body of tile_*.cpp, which set the instruction set and CLCE_TILE_NAMESPACE before they include it.
#include <cmath>
#include <type_traits>

#include "cpu/tile.h"
#include "cpu/vec.h"

namespace clce::cpu::CLCE_TILE_NAMESPACE {
namespace {

// The kinds of beta that save an exponential.
enum class Beta { kZero, kOne, kAny };

// e^(beta s), from e^s where that is enough.
template <Beta kBeta, class T>
CLCE_INLINE Vec<T> power_beta(Vec<T> e, Vec<T> s, T beta) {
  if constexpr (kBeta == Beta::kZero) return Vec<T>(T(1));
  if constexpr (kBeta == Beta::kOne) return e;
  return exp_vec(s * Vec<T>(beta));
}

// Calls body(vector of dot products, column, count) over columns [begin, end); the last vector is partial.
template <class T, class Body>
inline void for_columns(const T* row, int64_t begin, int64_t end, const Body& body) {
  int64_t j = begin;
  for (; j + Vec<T>::size() <= end; j += Vec<T>::size()) body(Vec<T>::loadu(row + j), j, Vec<T>::size());
  if (j < end) body(Vec<T>::loadu(row + j, end - j), j, end - j);
}

// The row's negatives and positives as ranges of columns, without the anchor itself.
template <class T, class Negatives, class Positives>
inline void for_segments(const RowRange& range, int64_t cols, const Negatives& negatives,
                         const Positives& positives) {
  const int64_t cut = range.self;
  const auto split = [cut](int64_t begin, int64_t end, const auto& body) {
    if (cut < begin || cut >= end) {
      if (begin < end) body(begin, end);
    } else {
      if (begin < cut) body(begin, cut);
      if (cut + 1 < end) body(cut + 1, end);
    }
  };
  split(0, range.pos_begin, negatives);
  split(range.pos_begin, range.pos_end, positives);
  split(range.pos_end, cols, negatives);
}

template <class T>
CLCE_INLINE void add_to(T* target, Vec<T> value, int64_t count) {
  if (count == Vec<T>::size()) {
    (Vec<T>::loadu(target) + value).store(target);
  } else {
    (Vec<T>::loadu(target, count) + value).store(target, count);
  }
}

// Zero in the lanes that a partial vector does not have.
template <class T>
CLCE_INLINE Vec<T> keep(Vec<T> value, int64_t count) {
  if (count == Vec<T>::size()) return value;
  return select(Vec<T>::first(count), value, Vec<T>(T(0)));
}

template <class T, Beta kBeta, bool kColumns>
void forward_bounded_as(const Tile<T>& tile, const BoundedSums<T>& rows_out, const BoundedSums<T>* cols_out) {
  const Vec<T> scale(tile.scale);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* row = tile.dots + i * tile.ld;
    Vec<T> sum_pos(T(0)), exp_pos(T(0)), exp_w(T(0)), exp_wn(T(0));
    const auto negatives = [&](int64_t begin, int64_t end) {
      for_columns(row, begin, end, [&](Vec<T> dots, int64_t j, int64_t count) {
        const Vec<T> s = dots * scale;
        const Vec<T> e = keep(exp_vec(s), count);
        const Vec<T> v = power_beta<kBeta>(e, s, tile.beta);
        const Vec<T> ev = kBeta == Beta::kZero ? e : e * v;
        exp_wn = exp_wn + ev;
        if constexpr (kColumns) add_to(cols_out->exp_wn + j, ev, count);
        if constexpr (kBeta != Beta::kZero) {  // beta 0: exp_w is the number of negatives
          const Vec<T> kept = keep(v, count);
          exp_w = exp_w + kept;
          if constexpr (kColumns) add_to(cols_out->exp_w + j, kept, count);
        }
      });
    };
    const auto positives = [&](int64_t begin, int64_t end) {
      for_columns(row, begin, end, [&](Vec<T> dots, int64_t j, int64_t count) {
        const Vec<T> s = keep(dots * scale, count);
        const Vec<T> e = keep(exp_vec(s), count);
        sum_pos = sum_pos + s;
        exp_pos = exp_pos + e;
        if constexpr (kColumns) {
          add_to(cols_out->sum_pos + j, s, count);
          add_to(cols_out->exp_pos + j, e, count);
        }
      });
    };
    for_segments<T>(tile.ranges[i], tile.cols, negatives, positives);
    rows_out.sum_pos[i] = horizontal_sum(sum_pos);
    rows_out.exp_pos[i] = horizontal_sum(exp_pos);
    rows_out.exp_w[i] = horizontal_sum(exp_w);
    rows_out.exp_wn[i] = horizontal_sum(exp_wn);
  }
}

// Raises a running maximum: the sums so far, e^(power (s - maximum)), become sums relative to the new one.
template <class T>
inline void raise_maximum(T& maximum, T candidate, T* sum_a, T power_a, T* sum_b, T power_b) {
  if (!(candidate > maximum)) return;
  if (*sum_a != 0) *sum_a *= std::exp(power_a * (maximum - candidate));
  if (sum_b != nullptr && *sum_b != 0) *sum_b *= std::exp(power_b * (maximum - candidate));
  maximum = candidate;
}

template <class T, Beta kBeta>
void forward_unbounded_as(const Tile<T>& tile, const UnboundedSums<T>& rows) {
  const Vec<T> scale(tile.scale);
  const T beta = tile.beta;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* row = tile.dots + i * tile.ld;
    const auto largest = [&](int64_t begin, int64_t end) {
      Vec<T> top(-INFINITY);
      for_columns(row, begin, end, [&](Vec<T> dots, int64_t, int64_t count) {
        top = maximum(top, select(Vec<T>::first(count), dots * scale, Vec<T>(-INFINITY)));
      });
      return horizontal_max(top);
    };
    const auto negatives = [&](int64_t begin, int64_t end) {
      raise_maximum<T>(rows.max_neg[i], largest(begin, end), &rows.exp_w[i], beta, &rows.exp_wn[i], 1 + beta);
      const Vec<T> top(rows.max_neg[i]);
      Vec<T> exp_w(T(0)), exp_wn(T(0));
      for_columns(row, begin, end, [&](Vec<T> dots, int64_t, int64_t count) {
        const Vec<T> s = dots * scale - top;
        const Vec<T> e = keep(exp_vec(s), count);
        const Vec<T> v = keep(power_beta<kBeta>(e, s, beta), count);
        exp_w = exp_w + v;
        // e * v would lose what only one of them keeps from underflow.
        exp_wn = exp_wn + keep(exp_vec(s * Vec<T>(1 + beta)), count);
      });
      rows.exp_w[i] += horizontal_sum(exp_w);
      rows.exp_wn[i] += horizontal_sum(exp_wn);
    };
    const auto positives = [&](int64_t begin, int64_t end) {
      raise_maximum<T>(rows.max_pos[i], largest(begin, end), &rows.exp_pos[i], T(1), nullptr, T(0));
      const Vec<T> top(rows.max_pos[i]);
      Vec<T> sum_pos(T(0)), exp_pos(T(0));
      for_columns(row, begin, end, [&](Vec<T> dots, int64_t, int64_t count) {
        const Vec<T> s = dots * scale;
        sum_pos = sum_pos + keep(s, count);
        exp_pos = exp_pos + keep(exp_vec(s - top), count);
      });
      rows.sum_pos[i] += horizontal_sum(sum_pos);
      rows.exp_pos[i] += horizontal_sum(exp_pos);
    };
    for_segments<T>(tile.ranges[i], tile.cols, negatives, positives);
  }
}

template <class T>
inline Vec<T> load(const T* values, int64_t count) {
  return count == Vec<T>::size() ? Vec<T>::loadu(values) : Vec<T>::loadu(values, count);
}
template <class T>
inline void save(Vec<T> value, T* target, int64_t count) {
  count == Vec<T>::size() ? value.store(target) : value.store(target, count);
}

template <class T, Beta kBeta, bool kColumns>
void backward_bounded_as(const Tile<T>& tile, const Coefficients<T>& rows, const Coefficients<T>* cols) {
  const Vec<T> scale(tile.scale);
  // A coefficient of row i, with the column's added in symmetric tiles.
  const auto both = [](T row, const T* columns, int64_t j, int64_t count) {
    if constexpr (kColumns) return Vec<T>(row) + load(columns + j, count);
    return Vec<T>(row);
  };
  const Coefficients<T> none{};
  const Coefficients<T>& column = kColumns ? *cols : none;
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* row = tile.dots + i * tile.ld;
    const auto negatives = [&](int64_t begin, int64_t end) {
      for_columns<T>(row, begin, end, [&](Vec<T> dots, int64_t j, int64_t count) {
        const Vec<T> s = dots * scale;
        const Vec<T> e = exp_vec(s);
        const Vec<T> wn = both(rows.wn[i], column.wn, j, count);
        if constexpr (kBeta == Beta::kZero) {
          save(e * wn, row + j, count);
        } else {
          const Vec<T> w = both(rows.w[i], column.w, j, count);
          save(power_beta<kBeta>(e, s, tile.beta) * fmadd(e, wn, w), row + j, count);
        }
      });
    };
    const auto positives = [&](int64_t begin, int64_t end) {
      for_columns<T>(row, begin, end, [&](Vec<T> dots, int64_t j, int64_t count) {
        const Vec<T> e = exp_vec(dots * scale);
        const Vec<T> pos = both(rows.pos[i], column.pos, j, count);
        save(fmadd(e, pos, both(rows.sum_pos[i], column.sum_pos, j, count)), row + j, count);
      });
    };
    for_segments<T>(tile.ranges[i], tile.cols, negatives, positives);
    if (tile.ranges[i].self >= 0) row[tile.ranges[i].self] = 0;
  }
}

template <class T, bool kColumns>
void backward_unbounded_as(const Tile<T>& tile, const Coefficients<T>& rows, const Coefficients<T>* cols) {
  const Vec<T> scale(tile.scale), one(T(1)), beta(tile.beta), one_plus_beta(1 + tile.beta);
  // coefficient * e^(power * s - lse)
  const auto term = [](Vec<T> coefficient, Vec<T> power, Vec<T> s, Vec<T> lse, Vec<T> lse_low) {
    return coefficient * exp_vec(fmsub(power, s, lse) - lse_low);
  };
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* row = tile.dots + i * tile.ld;
    const auto of_row = [i](const T* values) { return Vec<T>(values[i]); };
    const auto negatives = [&](int64_t begin, int64_t end) {
      for_columns<T>(row, begin, end, [&](Vec<T> dots, int64_t j, int64_t count) {
        const Vec<T> s = dots * scale;
        Vec<T> g = term(of_row(rows.wn), one_plus_beta, s, of_row(rows.lse_wn), of_row(rows.lse_wn_low)) +
                   term(of_row(rows.w), beta, s, of_row(rows.lse_w), of_row(rows.lse_w_low));
        if constexpr (kColumns) {
          const auto of_col = [&](const T* values) { return load(values + j, count); };
          g = g + term(of_col(cols->wn), one_plus_beta, s, of_col(cols->lse_wn), of_col(cols->lse_wn_low)) +
              term(of_col(cols->w), beta, s, of_col(cols->lse_w), of_col(cols->lse_w_low));
        }
        save(g, row + j, count);
      });
    };
    const auto positives = [&](int64_t begin, int64_t end) {
      for_columns<T>(row, begin, end, [&](Vec<T> dots, int64_t j, int64_t count) {
        const Vec<T> s = dots * scale;
        Vec<T> g = of_row(rows.sum_pos) +
                   term(of_row(rows.pos), one, s, of_row(rows.lse_pos), of_row(rows.lse_pos_low));
        if constexpr (kColumns) {
          const auto of_col = [&](const T* values) { return load(values + j, count); };
          g = g + of_col(cols->sum_pos) +
              term(of_col(cols->pos), one, s, of_col(cols->lse_pos), of_col(cols->lse_pos_low));
        }
        save(g, row + j, count);
      });
    };
    for_segments<T>(tile.ranges[i], tile.cols, negatives, positives);
    if (tile.ranges[i].self >= 0) row[tile.ranges[i].self] = 0;
  }
}

template <class T, class Call>
void by_beta(T beta, const Call& call) {
  if (beta == 0) return call(std::integral_constant<Beta, Beta::kZero>{});
  if (beta == 1) return call(std::integral_constant<Beta, Beta::kOne>{});
  call(std::integral_constant<Beta, Beta::kAny>{});
}

template <class T>
void forward_bounded(const Tile<T>& tile, const BoundedSums<T>& rows_out, const BoundedSums<T>* cols_out) {
  by_beta(tile.beta, [&](auto beta) {
    cols_out != nullptr ? forward_bounded_as<T, decltype(beta)::value, true>(tile, rows_out, cols_out)
                        : forward_bounded_as<T, decltype(beta)::value, false>(tile, rows_out, nullptr);
  });
}

template <class T>
void forward_unbounded(const Tile<T>& tile, const UnboundedSums<T>& rows) {
  by_beta(tile.beta, [&](auto beta) { forward_unbounded_as<T, decltype(beta)::value>(tile, rows); });
}

template <class T>
void backward_bounded(const Tile<T>& tile, const Coefficients<T>& rows, const Coefficients<T>* cols) {
  by_beta(tile.beta, [&](auto beta) {
    cols != nullptr ? backward_bounded_as<T, decltype(beta)::value, true>(tile, rows, cols)
                    : backward_bounded_as<T, decltype(beta)::value, false>(tile, rows, nullptr);
  });
}

template <class T>
void backward_unbounded(const Tile<T>& tile, const Coefficients<T>& rows, const Coefficients<T>* cols) {
  cols != nullptr ? backward_unbounded_as<T, true>(tile, rows, cols)
                  : backward_unbounded_as<T, false>(tile, rows, nullptr);
}

template <class T>
void transpose(const T* in, int64_t rows, int64_t cols, int64_t ld_in, T* out, int64_t ld_out) {
  constexpr int64_t kStep = 16;  // keeps both sides' lines in L1
  for (int64_t i0 = 0; i0 < rows; i0 += kStep)
    for (int64_t j0 = 0; j0 < cols; j0 += kStep)
      for (int64_t i = i0; i < i0 + kStep && i < rows; ++i)
        for (int64_t j = j0; j < j0 + kStep && j < cols; ++j) out[j * ld_out + i] = in[i * ld_in + j];
}

}  // namespace

#define CLCE_STRING_(x) #x
#define CLCE_STRING(x) CLCE_STRING_(x)
#define CLCE_TILE_KERNELS(T)         \
  {CLCE_STRING(CLCE_TILE_NAMESPACE), \
   forward_bounded<T>,               \
   forward_unbounded<T>,             \
   backward_bounded<T>,              \
   backward_unbounded<T>,            \
   transpose<T>}
const TileKernels<float> kFloat = CLCE_TILE_KERNELS(float);
const TileKernels<double> kDouble = CLCE_TILE_KERNELS(double);

}  // namespace clce::cpu::CLCE_TILE_NAMESPACE
