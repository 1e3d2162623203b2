// dL/ds of a pair from numbers of its row and numbers of its column.
#pragma once

#include "cuda/kernels/labels.cuh"
#include "cuda/kernels/logits.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "family/loss.h"

namespace clce::cuda {

// One side of the backward pass. Sides that are keys only have no statistics.
template <class Element, class T>
struct Side {
  Rows<Element> rows;
  Labels labels;
  const T* statistics;   // [kNumStatistics, rows] or null
  const T* derivatives;  // [kNumDerivatives, rows] or null
  const T* upstream;     // gradients of the rows' losses, [rows]; or null: 1
};

// What a side's row contributes to dL/ds. Bounded logits:
//   positive pair  pos + pos_exp e^s        negative pair  w e^(beta s) + wn e^((1 + beta) s)
// where the statistics are in the coefficients, so that those of both sides of a symmetric pair add up.
// Unbounded logits: the same with e^(s - lse_pos), e^(beta s - lse_w), e^((1 + beta) s - lse_wn).
enum Coefficient : int {
  kCPos,
  kCPosExp,
  kCW,
  kCWn,
  kCLsePos,
  kCLseW,
  kCLseWn,
  kCLsePosLow,
  kCLseWLow,
  kCLseWnLow
};

constexpr int num_coefficients(bool unbounded) {
  return unbounded ? 10 : 4;
}

// d e^-(lse + low); 0 where the loss does not depend on it, even if there is nothing in the sum.
template <class T>
CLCE_DEVICE T over_exp(T d, T lse, T low) {
  return d == 0 ? T(0) : d * std::exp(-lse - low);
}

template <bool kUnbounded, class T>
struct Coefficients {
  T values[num_coefficients(kUnbounded)];
};

// A row's numbers as they lie in memory: on their way while something else is done.
template <class T>
struct RowNumbers {
  int64_t label;
  T derivatives[4], lse[3], low[3];
};

template <class Element, class T>
CLCE_DEVICE RowNumbers<T> fetch_row(const Side<Element, T>& side, int64_t row) {
  RowNumbers<T> r{};
  r.label = load_label(side.labels, row);
  if (!side.statistics || row >= side.rows.count) return r;
  const int64_t n = side.rows.count;
  const auto statistic = [&](int i) { return ptx::global_load(side.statistics + i * n + row); };
  const auto derivative = [&](int i) { return ptx::global_load(side.derivatives + i * n + row); };
  const T upstream = side.upstream ? ptx::global_load(side.upstream + row) : T(1);
#pragma unroll
  for (int i = 0; i < 4; ++i) r.derivatives[i] = derivative(kDSumPos + i) * upstream;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    r.lse[i] = statistic(kLsePos + i);
    r.low[i] = statistic(kLsePosLow + i);
  }
  return r;
}

// `unit` multiplies dL/ds.
template <bool kUnbounded, class T>
CLCE_DEVICE Coefficients<kUnbounded, T> make_coefficients(const RowNumbers<T>& r, T beta, T unit) {
  Coefficients<kUnbounded, T> c;
  c.values[kCPos] = r.derivatives[kDSumPos] * unit;
  c.values[kCPosExp] = r.derivatives[kDLsePos] * unit;
  c.values[kCW] = r.derivatives[kDLseW] * unit * beta;
  c.values[kCWn] = r.derivatives[kDLseWn] * unit * (1 + beta);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if constexpr (kUnbounded) {
      c.values[kCLsePos + i] = r.lse[i];
      c.values[kCLsePosLow + i] = r.low[i];
    } else {
      c.values[kCPosExp + i] = over_exp(c.values[kCPosExp + i], r.lse[i], r.low[i]);
    }
  }
  if (!kUnbounded && beta == 0) {
    // One exponential makes e^(beta s) of beta 1, and has to do for beta 0: e^s (wn + 0 e^s).
    c.values[kCW] = c.values[kCWn];
    c.values[kCWn] = 0;
  }
  return c;
}

// One coefficient's part at an unbounded logit: d e^(power s - lse), and nothing where d is 0, even if lse is
// -inf.
template <class T, class C>
CLCE_DEVICE T shifted(const C& c, int which, T power, T s) {
  const T d = c(which);
  const int i = which - kCPosExp;
  const T exponent = std::fma(power, s, -c(kCLsePos + i)) - c(kCLsePosLow + i);
  return d == 0 ? T(0) : d * exp2_of(exponent * kLog2E<T>);
}

// What the statistics of one side give at an unbounded logit.
template <class T, class C>
CLCE_DEVICE T shifted_gradient(const C& c, T s, bool positive, T beta) {
  if (positive) return c(kCPos) + shifted(c, kCPosExp, T(1), s);
  return shifted(c, kCWn, 1 + beta, s) + shifted(c, kCW, beta, s);
}

// Times the upstream gradient of a loss that is one number (null: 1), over the number of terms of a mean
// (null: no mean).
template <class T>
CLCE_DEVICE T reduced(T factor, const T* upstream, const T* num_terms) {
  if (upstream) factor *= ptx::global_load(upstream);
  if (num_terms) {
    const T terms = ptx::global_load(num_terms);
    factor /= terms > 1 ? terms : T(1);
  }
  return factor;
}

// The exponent to base 2 of a bounded logit; rounded as in the forward pass: it is divided here by the sum
// that was made there.
template <class T>
CLCE_DEVICE T exponent_of(T dot, T scale) {
  return dot * (scale * kLog2E<T>);
}

// dL/ds of a negative and of a positive at a bounded logit. w, wn: the sums of both sides' coefficients;
// row(i) and col(i) give the i-th of the pair's row and column.
template <Exponentials kMode, class T>
CLCE_DEVICE T negative_gradient_of(T exponent, T w, T wn, T beta) {
  const T e = exp2_of(exponent);
  return (kMode == Exponentials::kOne ? e : exp2_of(beta * exponent)) * (w + wn * e);
}
template <class T, class Row, class Col>
CLCE_DEVICE T positive_gradient_of(T exponent, const Row& row, const Col& col) {
  return row(kCPos) + col(kCPos) + (row(kCPosExp) + col(kCPosExp)) * exp2_of(exponent);
}

// dL/ds. row(i) and col(i) give the i-th coefficient of the pair's row and column.
template <Exponentials kMode, class T, class Row, class Col>
CLCE_DEVICE T logit_gradient(T dot, T scale, bool positive, bool negative, const Row& row, const Col& col,
                             T beta) {
  if constexpr (kMode == Exponentials::kUnbounded) {
    if (!positive && !negative) return 0;
    const T s = logit(dot, scale);
    return shifted_gradient(row, s, positive, beta) + shifted_gradient(col, s, positive, beta);
  } else {
    const T exponent = exponent_of(dot, scale);
    const T g = negative_gradient_of<kMode>(exponent, row(kCW) + col(kCW), row(kCWn) + col(kCWn), beta);
    const T from_positive = positive_gradient_of(exponent, row, col);
    return positive ? from_positive : negative ? g : T(0);
  }
}

// Labels and coefficients of kCount rows of one side, in shared memory. Coefficients lie in pairs, so that a
// negative's two are read at once, and those of neighbouring rows too.
template <int kCount, bool kUnbounded, class T>
struct SideNumbers {
  static constexpr int kCoefficients = num_coefficients(kUnbounded);
  static constexpr int kLabelsAt = kCoefficients * kCount * int(sizeof(T));
  static constexpr int kBytes = (kLabelsAt + TileLabels<kCount>::kBytes + 15) / 16 * 16;

  T* const values;  // [kCoefficients / 2][kCount][2]
  const TileLabels<kCount> labels;

  CLCE_DEVICE explicit SideNumbers(unsigned char* memory)
      : values(reinterpret_cast<T*>(memory)), labels(memory + kLabelsAt) {}

  CLCE_DEVICE T* at(int i, int place) const { return values + (i / 2 * kCount + place) * 2 + i % 2; }

  // By all lanes of a warp, for 32 places of one group.
  CLCE_DEVICE void store(int place, const RowNumbers<T>& row, int64_t none, T beta, T unit) const {
    labels.store(place, row.label, none);
    const auto c = make_coefficients<kUnbounded>(row, beta, unit);
#pragma unroll
    for (int i = 0; i < kCoefficients; ++i) ptx::shared_store(at(i, place), c.values[i]);
  }

  CLCE_DEVICE auto coefficients(int place) const {
    return [*this, place](int i) { return ptx::shared_load(at(i, place)); };
  }

  // w and wn of a row; of it and the next, where it is even.
  CLCE_DEVICE const ptx::Pair<T>* negatives(int place) const {
    return reinterpret_cast<const ptx::Pair<T>*>(at(kCW, place));
  }
  CLCE_DEVICE const ptx::Pack<T>* negatives_of_two(int place) const {
    static_assert(sizeof(T) == 4 && kCW % 2 == 0 && kCWn == kCW + 1);
    return reinterpret_cast<const ptx::Pack<T>*>(at(kCW, place));
  }
};

}  // namespace clce::cuda
