// The loss family once more, straight from its definitions: loops over pairs, plain exponentials in
// float64, derivatives by the chain rule on those same sums. It shares nothing with csrc/family but
// LossConfig, and is slow and short, so that it can be believed. Its own gradients are checked against
// differences in test_family.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "family/loss.h"

namespace clce::reference {

enum class Pair : char { kNeither, kPositive, kNegative };

// One anchor's loss and what it is made of.
struct Anchor {
  bool is_term = false;
  double n_pos = 0, n_neg = 0;
  double sum_pos = 0, pos = 0, w = 0, wn = 0;  // sums of s, e^s, e^(beta s), e^((1 + beta) s)
  double loss = 0;
  double d_scale = 0;           // derivative of the loss by 1 / temperature, at fixed logits
  std::vector<double> ds;       // by each of its logits
  std::vector<double> ds_size;  // the terms of ds, summed without their signs
};

// Logits may be as large as 700 / (1 + beta).
inline Anchor anchor(const std::vector<double>& s, const std::vector<Pair>& pairs, const LossConfig& config,
                     double temperature) {
  Anchor a;
  a.ds.assign(s.size(), 0.0);
  a.ds_size = a.ds;
  for (size_t j = 0; j < s.size(); ++j) {
    if (pairs[j] == Pair::kPositive) {
      a.n_pos += 1;
      a.sum_pos += s[j];
      a.pos += std::exp(s[j]);
    } else if (pairs[j] == Pair::kNegative) {
      a.n_neg += 1;
      a.w += std::exp(config.beta * s[j]);
      a.wn += std::exp((1 + config.beta) * s[j]);
    }
  }
  a.is_term = a.n_pos > 0 && !(config.negatives_only && a.n_neg == 0);
  if (!a.is_term) return a;

  // H, and its derivatives by sum e^((1 + beta) s), sum e^(beta s), sum over positives of e^s.
  double h = 0, h_wn = 0, h_w = 0, h_pos = 0, h_scale = 0;
  if (a.n_neg > 0) {
    h = a.n_neg * a.wn / a.w;
    h_wn = a.n_neg / a.w;
    h_w = -a.n_neg * a.wn / (a.w * a.w);
    if (config.debias > 0) {
      const double debiased = (h - config.debias * a.n_neg * a.pos / a.n_pos) / (1 - config.debias);
      const double floor = a.n_neg * std::exp(-1 / temperature);
      if (debiased > floor) {
        h = debiased;
        h_wn /= 1 - config.debias;
        h_w /= 1 - config.debias;
        h_pos = -config.debias * a.n_neg / a.n_pos / (1 - config.debias);
      } else {
        h = floor;
        h_wn = h_w = 0;
        h_scale = -floor;
      }
    }
  }
  const double denominator = config.negatives_only ? h : a.pos + h;
  const double d_pos = (config.negatives_only ? h_pos : 1 + h_pos) / denominator;
  a.loss = std::log(denominator);
  a.loss -= config.mean_inside_log ? std::log(a.pos / a.n_pos) : a.sum_pos / a.n_pos;
  a.d_scale = h_scale / denominator;
  for (size_t j = 0; j < s.size(); ++j) {
    double first = 0, second = 0;
    if (pairs[j] == Pair::kPositive) {
      const double e = std::exp(s[j]);
      first = d_pos * e;
      second = config.mean_inside_log ? -e / a.pos : -1 / a.n_pos;
    } else if (pairs[j] == Pair::kNegative) {
      // Where the hardness weights are constants, the derivative of w e^s is w e^s itself, which is
      // n_neg e^((1 + beta) s) over the sum of e^(beta s).
      first = h_wn * std::exp((1 + config.beta) * s[j]) / denominator;
      if (!config.detach_weights) {
        first *= 1 + config.beta;
        second = h_w * config.beta * std::exp(config.beta * s[j]) / denominator;
      }
    }
    a.ds[j] = first + second;
    a.ds_size[j] = std::abs(first) + std::abs(second);
  }
  return a;
}

// M anchors against N keys; without keys, against themselves.
struct Problem {
  int64_t num_anchors = 0, num_keys = 0, dim = 0;
  std::vector<double> anchors, keys;  // [M, dim], [N, dim]
  bool symmetric = false;
  bool has_self = false;
  int64_t self_offset = 0;
  std::vector<int64_t> anchor_labels, key_labels;  // by image; empty: row r has label r / views
  bool has_labels = false;
  int64_t views = 1, key_views = 1, ignore_index = -100;
  double temperature = 1;
  LossConfig config;
  std::vector<double> debias;  // of each anchor, instead of the config's; or empty

  LossConfig config_of(int64_t i) const {
    LossConfig of_anchor = config;
    if (!debias.empty()) of_anchor.debias = debias[i];
    return of_anchor;
  }

  const std::vector<double>& key_rows() const { return symmetric ? anchors : keys; }

  Pair pair(int64_t i, int64_t j) const {
    if (has_self && j == i + self_offset) return Pair::kNeither;
    const int64_t key_views_used = symmetric ? views : key_views;
    const auto& labels_of_keys = symmetric ? anchor_labels : key_labels;
    int64_t a = i / views, b = j / key_views_used;
    if (has_labels) {
      a = anchor_labels[a];
      b = labels_of_keys[b];
      if (a == ignore_index || b == ignore_index) return Pair::kNeither;
    }
    return a == b ? Pair::kPositive : Pair::kNegative;
  }

  int64_t num_terms() const {
    int64_t terms = 0;
    for (int64_t i = 0; i < num_anchors; ++i) {
      bool any[3] = {};
      for (int64_t j = 0; j < (symmetric ? num_anchors : num_keys); ++j) any[int(pair(i, j))] = true;
      terms += any[int(Pair::kPositive)] && (any[int(Pair::kNegative)] || !config.negatives_only);
    }
    return terms;
  }
};

struct Result {
  std::vector<Anchor> anchors;
  double num_terms = 0;
  std::vector<double> danchors, dkeys;  // [M, dim], [N, dim]; symmetric: danchors holds both sides' share
  double d_scale = 0;                   // by 1 / temperature, in all
  // For error bounds. An element of a gradient is a sum of products: the root of the sum of their squares,
  // the sum of their magnitudes, and the same with ds_size for ds; of each the largest among all elements.
  struct Products {
    double rms = 0, sum = 0, terms = 0;
  };
  Products anchor_products, key_products, scale_products;
  double max_logit = 0, sum_pos_magnitude = 0;  // the largest |s| and sum over positives of |s|
};

// Arithmetic: how a product is added to a sum, and the numbers that a gradient's product takes for a
// coefficient and an embedding's element.
struct Exact {
  using Sum = double;
  static void add(double& sum, double product) { sum += product; }
  static double operand(double g) { return g; }
  static double element(double z) { return z; }
};

template <class Arithmetic>
typename Arithmetic::Sum dot(const Arithmetic& arithmetic, const double* a, const double* b, int64_t dim) {
  typename Arithmetic::Sum sum = 0;
  for (int64_t d = 0; d < dim; ++d) arithmetic.add(sum, arithmetic.element(a[d]) * arithmetic.element(b[d]));
  return sum;
}

// The gradients are of the sum over anchors of upstream[i] L_i.
template <class Arithmetic = Exact>
Result evaluate(const Problem& p, const std::vector<double>& upstream, const Arithmetic& arithmetic = {}) {
  using Sum = typename Arithmetic::Sum;
  const int64_t m = p.num_anchors, n = p.symmetric ? m : p.num_keys, dim = p.dim;
  const auto& keys = p.key_rows();
  Result r;
  std::vector<double> g(m * n, 0.0), g_size(m * n, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> s(n);
    std::vector<Pair> pairs(n);
    double magnitude = 0;
    for (int64_t j = 0; j < n; ++j) {
      s[j] = static_cast<Sum>(dot(arithmetic, &p.anchors[i * dim], &keys[j * dim], dim) *
                              static_cast<Sum>(1 / p.temperature));
      pairs[j] = p.pair(i, j);
      if (pairs[j] == Pair::kNeither) continue;
      r.max_logit = std::max(r.max_logit, std::abs(s[j]));
      if (pairs[j] == Pair::kPositive) magnitude += std::abs(s[j]);
    }
    r.sum_pos_magnitude = std::max(r.sum_pos_magnitude, magnitude);
    Anchor a = anchor(s, pairs, p.config_of(i), p.temperature);
    r.num_terms += a.is_term;
    r.d_scale += upstream[i] * a.d_scale;
    for (int64_t j = 0; j < n; ++j) {
      g[i * n + j] = upstream[i] * a.ds[j];
      g_size[i * n + j] = std::abs(upstream[i]) * a.ds_size[j];
      const double part = g[i * n + j] * s[j] * p.temperature;
      r.scale_products.rms += part * part;
      r.scale_products.sum += std::abs(part);
      r.scale_products.terms += g_size[i * n + j] * std::abs(s[j]) * p.temperature;
    }
    a.ds = a.ds_size = {};  // a row of logits each
    r.anchors.push_back(std::move(a));
  }
  r.scale_products.rms = std::sqrt(r.scale_products.rms);
  // coefficient(i, j) of row j of z in row i of the gradient: of g or of g_size.
  auto product = [&](int64_t rows, int64_t cols, auto&& coefficient, const std::vector<double>& z,
                     std::vector<double>& out, Result::Products& products) {
    out.assign(rows * dim, 0.0);
    std::vector<Sum> sums(dim);
    std::vector<double> squares(dim), magnitudes(dim), terms(dim);
    for (int64_t i = 0; i < rows; ++i) {
      for (auto* v : {&squares, &magnitudes, &terms}) v->assign(dim, 0.0);
      sums.assign(dim, Sum(0));
      for (int64_t j = 0; j < cols; ++j) {
        const double c = coefficient(g, i, j), size = coefficient(g_size, i, j);
        if (size == 0) continue;
        const double rounded = arithmetic.operand(c);
        const double* row = &z[j * dim];
        for (int64_t d = 0; d < dim; ++d) {
          const double one = c * row[d];
          arithmetic.add(sums[d], rounded * arithmetic.element(row[d]));
          squares[d] += one * one;
          magnitudes[d] += std::abs(one);
          terms[d] += size * std::abs(row[d]);
        }
      }
      for (int64_t d = 0; d < dim; ++d) {
        out[i * dim + d] = static_cast<Sum>(sums[d] * static_cast<Sum>(1 / p.temperature));
        products.rms = std::max(products.rms, std::sqrt(squares[d]) / p.temperature);
        products.sum = std::max(products.sum, magnitudes[d] / p.temperature);
        products.terms = std::max(products.terms, terms[d] / p.temperature);
      }
    }
  };
  using Matrix = std::vector<double>;
  if (p.symmetric) {
    auto both = [&](const Matrix& x, int64_t i, int64_t j) { return x[i * n + j] + x[j * n + i]; };
    product(m, m, both, p.anchors, r.danchors, r.anchor_products);
  } else {
    auto by_anchor = [&](const Matrix& x, int64_t i, int64_t j) { return x[i * n + j]; };
    auto by_key = [&](const Matrix& x, int64_t j, int64_t i) { return x[i * n + j]; };
    product(m, n, by_anchor, p.keys, r.danchors, r.anchor_products);
    product(n, m, by_key, p.anchors, r.dkeys, r.key_products);
  }
  // Through the logits: their scale multiplies them all, so that its derivative is the sum of z . dz / scale.
  // In self-contrast danchors holds every logit twice.
  for (int64_t i = 0; i < m * dim; ++i) {
    r.d_scale += r.danchors[i] * p.anchors[i] * p.temperature / (p.symmetric ? 2 : 1);
  }
  return r;
}

}  // namespace clce::reference
