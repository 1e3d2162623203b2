// Every loss of the family, made of one anchor's statistics; its derivatives by them; and the gradient of a
// logit made of both.
//
//   log H  = log n_neg + lse_wn - lse_w                    H: the negatives' sum of w e^s
//   log D  = logaddexp(lse_pos, log H)                     denominator "all"
//          = log H                                         denominator "negatives" (decoupled)
//   L      = log D - sum_pos / n_pos                       summation "out"
//          = log D - lse_pos + log n_pos                   summation "in"
//   debias: H -> max((H - debias n_neg e^lse_pos / n_pos) / (1 - debias), n_neg e^(-1 / temperature)),
//           where debias, which anchors may have each their own, is not 0
//
// w is the hardness weight of a negative: proportional to e^(beta s), and 1 in the mean over the negatives.
//
// Sources: SupCon 2004.11362 and LaCViT 2303.18013 ("out", beta 0), SCHaNe 2308.14893 and CLCE
// 2402.14551 ("in", beta 1), HCL 2010.04592 (debias), DCL 2110.06848 (decoupled).
#pragma once

#include "family/statistics.h"

namespace clce {

// Larger ones are refused: beyond, 1 + beta and beta are too close for their difference to be a gradient.
constexpr double kLargestBeta = 10000;

struct LossConfig {
  double beta = 1.0;
  double debias = 0.0;
  bool mean_inside_log = false;  // summation "in"
  bool negatives_only = false;   // denominator "negatives"
  bool detach_weights = false;   // hardness weights are constants to the gradient
};

// Rows of a derivatives tensor [kNumDerivatives, M]: d L_i / d (statistic), then d L_i / d (1 / temperature)
// at fixed statistics (not zero only where the debiased H lies on its floor).
enum DerivativeRow : int {
  kDSumPos = 0,
  kDLsePos = 1,
  kDLseW = 2,
  kDLseWn = 3,
  kDScale = 4,
  kNumDerivatives = 5
};

template <class T>
struct Derivatives {
  T sum_pos, lse_pos, lse_w, lse_wn, scale;
};

// put(name, number) for each of them.
template <class T, class Put>
CLCE_HD void put_derivatives(const Derivatives<T>& value, const Put& put) {
  put(kDSumPos, value.sum_pos);
  put(kDLsePos, value.lse_pos);
  put(kDLseW, value.lse_w);
  put(kDLseWn, value.lse_wn);
  put(kDScale, value.scale);
}

template <class T>
CLCE_HD void store_derivatives(T* derivatives, int64_t num_anchors, int64_t row,
                               const Derivatives<T>& value) {
  put_derivatives(value, [&](int name, T number) { derivatives[name * num_anchors + row] = number; });
}

template <class T>
CLCE_HD Derivatives<T> load_derivatives(const T* derivatives, int64_t num_anchors, int64_t row) {
  const auto at = [&](int name) { return derivatives[name * num_anchors + row]; };
  return {at(kDSumPos), at(kDLsePos), at(kDLseW), at(kDLseWn), at(kDScale)};
}

template <class T>
struct AnchorLoss {
  bool is_term;  // false: nothing to compare with, no loss and no gradient; "mean" does not count it
  T value;
  Derivatives<T> d;
};

template <class T>
CLCE_HD AnchorLoss<T> anchor_loss(const Statistics<T>& s, const LossConfig& config, T scale) {
  AnchorLoss<T> out{false, T(0), {}};
  const bool has_negatives = s.n_neg > 0;
  if (!(s.n_pos > 0) || (config.negatives_only && !has_negatives)) return out;
  out.is_term = true;

  // log H and its derivatives by log(weighted mean of negatives), lse_pos and 1 / temperature.
  T log_h = minus_infinity<T>();
  T h_by_weighted = 1, h_by_lse_pos = 0, h_by_scale = 0;
  if (has_negatives) {
    log_h = std::log(s.n_neg) + ((s.lse_wn - s.lse_w) + (s.lse_wn_low - s.lse_w_low));
    if (config.debias > 0) {
      const T debias = T(config.debias);
      const T floor = std::log(s.n_neg) - scale;
      // Share of H that the false negatives are expected to make up.
      const T share = std::exp(std::log(debias * s.n_neg / s.n_pos) + s.lse_pos - log_h);
      const T debiased = log_h + std::log1p(-share) - std::log(T(1 - config.debias));
      // Written so that NaN is not taken for "on the floor".
      if (share >= 1 || debiased <= floor) {
        log_h = floor;
        h_by_weighted = 0;
        h_by_scale = -1;
      } else {
        log_h = debiased;
        h_by_weighted = 1 / (1 - share);
        h_by_lse_pos = -share / (1 - share);
      }
    }
  }

  // log D - lse_pos as a softplus: no cancellation between two large logarithms.
  const T gap = (log_h - s.lse_pos) - s.lse_pos_low;  // -inf without negatives
  T log_d_over_pos, d_log_h;                          // log D - lse_pos;  d log D / d log H = H / D
  if (config.negatives_only) {
    log_d_over_pos = gap;
    d_log_h = 1;
  } else if (gap > 0) {
    log_d_over_pos = gap + std::log1p(std::exp(-gap));
    d_log_h = 1 / (1 + std::exp(-gap));
  } else {
    const T e = has_negatives ? std::exp(gap) : T(0);
    log_d_over_pos = std::log1p(e);
    d_log_h = e / (1 + e);
  }

  if (config.mean_inside_log) {
    out.value = log_d_over_pos + std::log(s.n_pos);
    out.d.lse_pos = -d_log_h;
  } else {
    out.value = log_d_over_pos + ((s.lse_pos - s.sum_pos / s.n_pos) + s.lse_pos_low);
    out.d.lse_pos = 1 - d_log_h;
    out.d.sum_pos = -1 / s.n_pos;
  }
  if (has_negatives) {
    const T by_weighted = d_log_h * h_by_weighted;
    out.d.lse_wn = config.detach_weights ? by_weighted / T(1 + config.beta) : by_weighted;
    out.d.lse_w = config.detach_weights ? T(0) : -by_weighted;
    out.d.lse_pos += d_log_h * h_by_lse_pos;
    out.d.scale = d_log_h * h_by_scale;
  }
  return out;
}

// d loss / d s_ij of a positive and of a negative, from anchor i's statistics and the loss's derivatives by
// them. Every exponent is <= 0; fma and the low parts keep it exact to T where s and lse are large and close.
template <class T>
CLCE_HD T positive_gradient(T s, const Statistics<T>& statistics, const Derivatives<T>& d) {
  return d.sum_pos + d.lse_pos * std::exp((s - statistics.lse_pos) - statistics.lse_pos_low);
}

template <class T>
CLCE_HD T negative_gradient(T s, const Statistics<T>& statistics, const Derivatives<T>& d, T beta) {
  const T by_wn =
      d.lse_wn * (1 + beta) * std::exp(std::fma(1 + beta, s, -statistics.lse_wn) - statistics.lse_wn_low);
  if (beta == 0) return by_wn;
  return by_wn + d.lse_w * beta * std::exp(std::fma(beta, s, -statistics.lse_w) - statistics.lse_w_low);
}

// By the temperature t, of a loss whose derivative by 1 / t at fixed statistics is `by_scale`. Through the
// logits z_i . k_j / t, d(1/t) = t sum_i z_i . dz_i, summed over the rows of one side; `dots` is that sum of
// z_i . dz_i, twice it in self-contrast, where dz holds both sides' gradient.
CLCE_HD double gradient_by_temperature(double dots, bool symmetric, double by_scale, double t) {
  return -((symmetric ? dots / 2 : dots) + by_scale / t) / t;  // d(1/t) = -dt / t^2
}

}  // namespace clce
