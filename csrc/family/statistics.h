// The statistics of an anchor, from which every loss of the family is made; the partial sums that become
// them; and how partial sums over disjoint sets of keys merge.
//
//   s_ij = z_i . k_j / temperature, the logit of anchor i and key j
//   P(i): the positives, keys with the anchor's label; N(i): the negatives, keys with another label. The
//   anchor itself and keys labelled ignore_index are in neither.
#pragma once

#include <cmath>
#include <cstdint>

#include "family/macros.h"

namespace clce {

// Rows of a statistics tensor [kNumStatistics, M].
enum StatisticRow : int {
  kNumPos = 0,  // |P(i)|
  kNumNeg = 1,  // |N(i)|
  kSumPos = 2,  // sum over P of s
  kLsePos = 3,  // log sum over P of e^s
  kLseW = 4,    // log sum over N of e^(beta s)
  kLseWn = 5,   // log sum over N of e^((1 + beta) s)
  // What rounding took from the three logarithms above: at (1 + beta) / temperature = 300 one float32 alone
  // would leave five digits of e^(s - lse).
  kLsePosLow = 6,
  kLseWLow = 7,
  kLseWnLow = 8,
  kNumStatistics = 9
};

template <class T>
struct Statistics {
  T n_pos, n_neg, sum_pos, lse_pos, lse_w, lse_wn;
  T lse_pos_low, lse_w_low, lse_wn_low;
};

// at(name) gives the number of that name.
template <class T, class At>
CLCE_HD Statistics<T> statistics_from(const At& at) {
  return {at(kNumPos), at(kNumNeg),    at(kSumPos),  at(kLsePos),  at(kLseW),
          at(kLseWn),  at(kLsePosLow), at(kLseWLow), at(kLseWnLow)};
}

// put(name, number) for each of them.
template <class T, class Put>
CLCE_HD void put_statistics(const Statistics<T>& value, const Put& put) {
  put(kNumPos, value.n_pos);
  put(kNumNeg, value.n_neg);
  put(kSumPos, value.sum_pos);
  put(kLsePos, value.lse_pos);
  put(kLseW, value.lse_w);
  put(kLseWn, value.lse_wn);
  put(kLsePosLow, value.lse_pos_low);
  put(kLseWLow, value.lse_w_low);
  put(kLseWnLow, value.lse_wn_low);
}

template <class T>
CLCE_HD Statistics<T> load_statistics(const T* statistics, int64_t num_anchors, int64_t row) {
  return statistics_from<T>([&](int name) { return statistics[name * num_anchors + row]; });
}

template <class T>
CLCE_HD void store_statistics(T* statistics, int64_t num_anchors, int64_t row, const Statistics<T>& value) {
  put_statistics(value, [&](int name, T number) { statistics[name * num_anchors + row] = number; });
}

// What a tile pass adds up for one anchor. Positives and negatives have maxima of their own: with
// one in common, all negatives can underflow while the positives are close to it.
// Bounded logits leave both maxima at 0, so that tiles merge by addition.
template <class T>
struct PartialSums {
  T n_pos = 0, n_neg = 0;
  T sum_pos = 0;
  T max_pos = 0, exp_pos = 0;            // exp_pos = sum over P of e^(s - max_pos)
  T max_neg = 0, exp_w = 0, exp_wn = 0;  // sums over N of e^(beta (s - max_neg)), e^((1 + beta)(s - max_neg))
};

// The fields of PartialSums, for who keeps each apart. The maxima come last: bounded logits leave them out.
enum Field : int { kFNumPos, kFNumNeg, kFSumPos, kFExpPos, kFExpW, kFExpWn, kFMaxPos, kFMaxNeg };

constexpr int num_fields(bool unbounded) {
  return unbounded ? 8 : 6;
}

// use(field, pointer to the member) for each of them.
template <class T, class Use>
CLCE_HD void for_each_field(bool unbounded, const Use& use) {
  using Sums = PartialSums<T>;
  use(kFNumPos, &Sums::n_pos);
  use(kFNumNeg, &Sums::n_neg);
  use(kFSumPos, &Sums::sum_pos);
  use(kFExpPos, &Sums::exp_pos);
  use(kFExpW, &Sums::exp_w);
  use(kFExpWn, &Sums::exp_wn);
  if (unbounded) {
    use(kFMaxPos, &Sums::max_pos);
    use(kFMaxNeg, &Sums::max_neg);
  }
}

// Largest |s| * (1 + beta) for which sums of plain e^((1 + beta) s) are safe in float32: half of its
// exponent range (87) is left to the sum itself.
constexpr double kBoundedLogit = 43.5;

// Normalised embeddings have |s| <= 1 / temperature: no running maximum is needed while that is small.
CLCE_HD bool logits_are_bounded(bool normalized, double temperature, double beta) {
  return normalized && (1.0 + beta) / temperature <= kBoundedLogit;
}

template <class T>
CLCE_HD T minus_infinity() {
  return T(-INFINITY);
}

// What logits are multiplied by: beta and 1 + beta, each rounded once, to the type that tiles are computed
// in. Sums, their logarithms and gradients must all use the same two numbers: the logarithm of a sum with
// another rounding of beta is off by the difference times the logit, which can be of any size.
template <class T>
struct Hardness {
  T beta, one_plus_beta;
};

template <class T>
CLCE_HD Hardness<T> hardness(T beta) {
  return {beta, 1 + beta};
}

// The same numbers, for sums that are kept in double.
template <class T>
CLCE_HD Hardness<double> widened(const Hardness<T>& h) {
  return {double(h.beta), double(h.one_plus_beta)};
}

// Adds the sums over one set of keys to those over another set that shares no key with it.
template <class T>
CLCE_HD void merge(PartialSums<T>& into, const PartialSums<T>& from, const Hardness<T>& h) {
  into.sum_pos += from.sum_pos;
  if (from.n_pos > 0) {
    if (into.n_pos > 0) {
      const T top = into.max_pos > from.max_pos ? into.max_pos : from.max_pos;
      into.exp_pos =
          into.exp_pos * std::exp(into.max_pos - top) + from.exp_pos * std::exp(from.max_pos - top);
      into.max_pos = top;
    } else {
      into.exp_pos = from.exp_pos;
      into.max_pos = from.max_pos;
    }
  }
  if (from.n_neg > 0) {
    if (into.n_neg > 0) {
      const T top = into.max_neg > from.max_neg ? into.max_neg : from.max_neg;
      const T down_into = into.max_neg - top, down_from = from.max_neg - top;
      into.exp_w = into.exp_w * std::exp(h.beta * down_into) + from.exp_w * std::exp(h.beta * down_from);
      into.exp_wn = into.exp_wn * std::exp(h.one_plus_beta * down_into) +
                    from.exp_wn * std::exp(h.one_plus_beta * down_from);
      into.max_neg = top;
    } else {
      into.exp_w = from.exp_w;
      into.exp_wn = from.exp_wn;
      into.max_neg = from.max_neg;
    }
  }
  into.n_pos += from.n_pos;
  into.n_neg += from.n_neg;
}

// high + low = factor * maximum + log(sum), to twice the precision of T where factor * maximum is large.
template <class T>
CLCE_HD void log_in_two(T factor, T maximum, T sum, T& high, T& low) {
  const T product = rounded_product(factor, maximum);
  const T product_low = std::fma(factor, maximum, -product);
  const T logarithm = std::log(sum);
  high = product + logarithm;
  low = T(0);
  if (std::isfinite(high)) {
    const T back = high - product;
    low = ((product - (high - back)) + (logarithm - back)) + product_low;
  }
}

template <class T>
CLCE_HD Statistics<T> finalize(const PartialSums<T>& sums, const Hardness<T>& h) {
  Statistics<T> out{
      sums.n_pos, sums.n_neg, sums.sum_pos, minus_infinity<T>(), minus_infinity<T>(), minus_infinity<T>(),
      T(0),       T(0),       T(0)};
  if (sums.n_pos > 0) log_in_two(T(1), sums.max_pos, sums.exp_pos, out.lse_pos, out.lse_pos_low);
  if (sums.n_neg > 0) {
    log_in_two(h.beta, sums.max_neg, sums.exp_w, out.lse_w, out.lse_w_low);
    log_in_two(h.one_plus_beta, sums.max_neg, sums.exp_wn, out.lse_wn, out.lse_wn_low);
  }
  return out;
}

// Statistics in double, rounded to T: the low parts take up what rounding takes from the logarithms. Where T
// is double, that is the low part itself.
template <class T>
CLCE_HD Statistics<T> rounded(const Statistics<double>& s) {
  Statistics<T> out{T(s.n_pos), T(s.n_neg), T(s.sum_pos), T(0), T(0), T(0), T(0), T(0), T(0)};
  const auto round = [](double log, double log_low, T& high, T& low) {
    high = T(log + log_low);
    low = std::isfinite(log) ? T((log - double(high)) + log_low) : T(0);
  };
  round(s.lse_pos, s.lse_pos_low, out.lse_pos, out.lse_pos_low);
  round(s.lse_w, s.lse_w_low, out.lse_w, out.lse_w_low);
  round(s.lse_wn, s.lse_wn_low, out.lse_wn, out.lse_wn_low);
  return out;
}

}  // namespace clce
