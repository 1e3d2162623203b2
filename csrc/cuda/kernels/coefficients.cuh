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

// dL/ds. row(i) and col(i) give the i-th coefficient of the pair's row and column.
template <Exponentials kMode, class T, class Row, class Col>
CLCE_DEVICE T logit_gradient(T dot, T scale, bool positive, bool negative, const Row& row, const Col& col,
                             T beta) {
  if constexpr (kMode == Exponentials::kUnbounded) {
    if (!positive && !negative) return 0;
    const T s = logit(dot, scale);
    return shifted_gradient(row, s, positive, beta) + shifted_gradient(col, s, positive, beta);
  } else {
    // Rounded as in the forward pass: it is divided here by the sum that was made there.
    const T exponent = dot * (scale * kLog2E<T>);
    const T e = exp2_of(exponent);
    const T w = row(kCW) + col(kCW), wn = row(kCWn) + col(kCWn);
    T g;
    if constexpr (kMode == Exponentials::kOne) {
      // beta 0: w is 0 and e^((1 + beta) s) is e. beta 1: e^2.
      g = beta == 0 ? wn * e : e * (w + wn * e);
    } else {
      g = exp2_of(beta * exponent) * (w + wn * e);
    }
    const T from_positive = row(kCPos) + col(kCPos) + (row(kCPosExp) + col(kCPosExp)) * e;
    return positive ? from_positive : negative ? g : T(0);
  }
}

}  // namespace clce::cuda
