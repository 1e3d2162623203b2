// csrc/family against brute force, and the brute force's gradients against differences.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "check.h"
#include "reference.h"

using namespace clce;
using reference::Pair;

namespace {

const double kInf = std::numeric_limits<double>::infinity();
const double kNaN = std::numeric_limits<double>::quiet_NaN();

void check_close(double found, double expected, double tolerance, const std::string& what) {
  ++check::num_checks();
  const bool same = found == expected || (std::isnan(found) && std::isnan(expected));
  if (!same && !(std::abs(found - expected) <= tolerance)) {
    std::ostringstream text;
    text.precision(17);
    text << what << " is " << found << ", expected " << expected << " within " << tolerance;
    check::fail(__FILE__, __LINE__, text.str());
  }
}

struct Row {
  std::vector<double> s;
  std::vector<Pair> pairs;
};

Row draw_row(std::mt19937& random, int positives, int negatives, double largest) {
  Row row;
  std::uniform_real_distribution<double> logit(-largest, largest);
  for (int i = 0; i < positives; ++i) row.pairs.push_back(Pair::kPositive);
  for (int i = 0; i < negatives; ++i) row.pairs.push_back(Pair::kNegative);
  row.pairs.push_back(Pair::kNeither);
  std::shuffle(row.pairs.begin(), row.pairs.end(), random);
  for (size_t i = 0; i < row.pairs.size(); ++i) row.s.push_back(logit(random));
  return row;
}

// As a backend adds up, in one pass: with running maxima or without.
template <class T>
PartialSums<T> accumulate(const Row& row, size_t begin, size_t end, T beta, bool bounded) {
  PartialSums<T> sums;
  for (size_t j = begin; j < end; ++j) {
    if (row.pairs[j] == Pair::kNeither) continue;
    const T s = T(row.s[j]);
    PartialSums<T> one;
    if (row.pairs[j] == Pair::kPositive) {
      one.n_pos = 1;
      one.sum_pos = s;
      one.max_pos = bounded ? T(0) : s;
      one.exp_pos = bounded ? std::exp(s) : T(1);
    } else {
      one.n_neg = 1;
      one.max_neg = bounded ? T(0) : s;
      one.exp_w = bounded ? std::exp(beta * s) : T(1);
      one.exp_wn = bounded ? std::exp((1 + beta) * s) : T(1);
    }
    merge(sums, one, hardness(beta));
  }
  return sums;
}

template <class T>
Statistics<T> statistics_of(const Row& row, T beta, bool bounded = false) {
  return finalize(accumulate<T>(row, 0, row.s.size(), beta, bounded), hardness(beta));
}

std::vector<LossConfig> all_configs() {
  std::vector<LossConfig> configs;
  for (double beta : {0.0, 0.5, 1.0, 2.0}) {
    for (double debias : {0.0, 0.1, 0.9}) {
      for (int flags = 0; flags < 8; ++flags) {
        LossConfig c;
        c.beta = beta;
        c.debias = debias;
        c.mean_inside_log = flags & 1;
        c.negatives_only = flags & 2;
        c.detach_weights = flags & 4;
        configs.push_back(c);
      }
    }
  }
  return configs;
}

std::string describe(const LossConfig& c) {
  std::ostringstream text;
  text << "beta " << c.beta << ", debias " << c.debias << (c.mean_inside_log ? ", in" : ", out")
       << (c.negatives_only ? ", negatives" : ", all") << (c.detach_weights ? ", detached" : "");
  return text.str();
}

TEST("reference/gradients are differences of losses") {
  std::mt19937 random(1);
  for (const LossConfig& config : all_configs()) {
    for (double temperature : {1.0, 0.3}) {
      for (auto [positives, negatives] : {std::pair{1, 1}, {3, 5}, {2, 0}, {0, 3}, {1, 40}}) {
        const Row row = draw_row(random, positives, negatives, 2.0);
        const auto a = reference::anchor(row.s, row.pairs, config, temperature);
        if (config.detach_weights) continue;  // not the gradient of a function; see the next test
        const double h = 1e-6;
        for (size_t j = 0; j < row.s.size(); ++j) {
          Row up = row, down = row;
          up.s[j] += h;
          down.s[j] -= h;
          const double slope = (reference::anchor(up.s, up.pairs, config, temperature).loss -
                                reference::anchor(down.s, down.pairs, config, temperature).loss) /
                               (2 * h);
          check_close(a.ds[j], slope, 1e-7, "ds, " + describe(config));
        }
        const double scale = 1 / temperature;
        const double slope = (reference::anchor(row.s, row.pairs, config, 1 / (scale + h)).loss -
                              reference::anchor(row.s, row.pairs, config, 1 / (scale - h)).loss) /
                             (2 * h);
        check_close(a.d_scale, slope, 1e-7, "d_scale, " + describe(config));
      }
    }
  }
}

// With constant hardness weights: differences of a loss in which w is frozen at the row's own logits.
TEST("reference/detached hardness weights are constants") {
  std::mt19937 random(2);
  for (double beta : {0.0, 0.5, 1.0, 2.0}) {
    const Row row = draw_row(random, 3, 7, 2.0);
    LossConfig config;
    config.beta = beta;
    config.detach_weights = true;
    const auto a = reference::anchor(row.s, row.pairs, config, 1.0);
    auto loss = [&](const std::vector<double>& s) {
      double pos = 0, h = 0;
      for (size_t k = 0; k < s.size(); ++k) {
        if (row.pairs[k] == Pair::kPositive) pos += std::exp(s[k]);
        if (row.pairs[k] == Pair::kNegative) h += a.n_neg * std::exp(beta * row.s[k]) / a.w * std::exp(s[k]);
      }
      double sum_pos = 0;
      for (size_t k = 0; k < s.size(); ++k) sum_pos += row.pairs[k] == Pair::kPositive ? s[k] : 0.0;
      return std::log(pos + h) - sum_pos / a.n_pos;
    };
    check_close(a.loss, loss(row.s), 1e-12, "loss");
    for (size_t j = 0; j < row.s.size(); ++j) {
      auto up = row.s, down = row.s;
      up[j] += 1e-6;
      down[j] -= 1e-6;
      check_close(a.ds[j], (loss(up) - loss(down)) / 2e-6, 1e-8, "ds");
    }
  }
}

// Gradients with respect to the embeddings, in every geometry.
TEST("reference/embedding gradients are differences") {
  std::mt19937 random(3);
  std::normal_distribution<double> normal(0, 0.7);
  for (int variant = 0; variant < 4; ++variant) {
    reference::Problem p;
    p.symmetric = variant == 0;
    p.has_self = variant != 1;
    p.self_offset = variant == 2 ? 2 : 0;
    p.num_anchors = 6;
    p.num_keys = p.symmetric ? 6 : 9;
    p.dim = 3;
    p.temperature = 0.7;
    p.has_labels = variant != 3;
    p.anchor_labels = {0, 1, 0, -100, 1, 2};
    p.key_labels = {0, 0, 1, 1, 2, 2, -100, 1, 5};
    if (variant == 3) p.views = p.key_views = 3;
    for (int i = 0; i < 18; ++i) p.anchors.push_back(normal(random));
    for (int i = 0; i < 27; ++i) p.keys.push_back(normal(random));
    std::vector<double> upstream;
    for (int i = 0; i < 6; ++i) upstream.push_back(normal(random));
    auto total = [&](const reference::Problem& q) {
      double sum = 0;
      const auto r = reference::evaluate(q, upstream);
      for (size_t i = 0; i < r.anchors.size(); ++i) sum += upstream[i] * r.anchors[i].loss;
      return sum;
    };
    const auto r = reference::evaluate(p, upstream);
    auto slope = [&](auto&& change) {
      reference::Problem up = p, down = p;
      change(up, 1e-6);
      change(down, -1e-6);
      return (total(up) - total(down)) / 2e-6;
    };
    for (int i = 0; i < 18; ++i) {
      check_close(r.danchors[i], slope([&](auto& q, double h) { q.anchors[i] += h; }), 1e-7, "danchors");
    }
    for (int i = 0; i < 27 && !p.symmetric; ++i) {
      check_close(r.dkeys[i], slope([&](auto& q, double h) { q.keys[i] += h; }), 1e-7, "dkeys");
    }
    check_close(r.d_scale, slope([&](auto& q, double h) { q.temperature = 1 / (1 / q.temperature + h); }),
                1e-7, "d_scale");
  }
}

template <class T>
void test_statistics() {
  std::mt19937 random(4);
  for (double beta : {0.0, 0.5, 1.0, 2.0}) {
    for (double largest : {0.5, 2.0, 20.0, 100.0}) {
      for (auto [positives, negatives] : {std::pair{1, 1}, {3, 5}, {2, 0}, {0, 3}, {0, 0}, {20, 200}}) {
        const Row row = draw_row(random, positives, negatives, largest);
        LossConfig config;
        config.beta = beta;
        const auto a = reference::anchor(row.s, row.pairs, config, 1.0);
        // Rounding errors of a sum grow as a random walk.
        const double relative = T(4 + std::sqrt(row.s.size())) * std::numeric_limits<T>::epsilon();
        for (bool bounded : {false, true}) {
          if (bounded && (1 + beta) * largest > kBoundedLogit) continue;
          const auto s = statistics_of<T>(row, T(beta), bounded);
          const double tolerance = relative * (1 + beta) * (1 + largest);
          check_close(s.n_pos, a.n_pos, 0, "n_pos");
          check_close(s.n_neg, a.n_neg, 0, "n_neg");
          check_close(s.sum_pos, a.sum_pos, relative * (1 + largest * positives), "sum_pos");
          check_close(s.lse_pos, std::log(a.pos), tolerance, "lse_pos");
          check_close(s.lse_w, std::log(a.w), tolerance, "lse_w");
          check_close(s.lse_wn, std::log(a.wn), tolerance, "lse_wn");
          // Any split of the keys gives the same.
          for (size_t cut : {size_t(0), row.s.size() / 3, row.s.size() / 2, row.s.size()}) {
            auto sums = accumulate<T>(row, 0, cut, T(beta), bounded);
            merge(sums, accumulate<T>(row, cut, row.s.size(), T(beta), bounded), hardness(T(beta)));
            const auto merged = finalize(sums, hardness(T(beta)));
            check_close(merged.n_pos, s.n_pos, 0, "merged n_pos");
            check_close(merged.n_neg, s.n_neg, 0, "merged n_neg");
            check_close(merged.sum_pos, s.sum_pos, relative * (1 + largest * positives), "merged sum_pos");
            check_close(merged.lse_pos, s.lse_pos, tolerance, "merged lse_pos");
            check_close(merged.lse_w, s.lse_w, tolerance, "merged lse_w");
            check_close(merged.lse_wn, s.lse_wn, tolerance, "merged lse_wn");
          }
        }
      }
    }
  }
}
TEST("family/statistics, float") {
  test_statistics<float>();
}
TEST("family/statistics, double") {
  test_statistics<double>();
}

// All negatives far below the positives, and the other way round: no 0 / 0.
TEST("family/statistics keep separate maxima") {
  for (double gap : {-190.0, 190.0}) {
    Row row{{95 - gap / 2, 94 - gap / 2, 95 + gap / 2, 94 + gap / 2},
            {Pair::kPositive, Pair::kPositive, Pair::kNegative, Pair::kNegative}};
    for (double& s : row.s) s -= 95;
    for (double beta : {0.0, 1.0, 2.0}) {
      LossConfig config;
      config.beta = beta;
      const auto expected = reference::anchor(row.s, row.pairs, config, 0.01);
      const auto found = anchor_loss(statistics_of<float>(row, float(beta)), config, 100.0f);
      check_close(found.value, expected.loss, 1e-6 * (1 + std::abs(expected.loss)), "loss");
    }
  }
}

template <class T>
void test_loss(double largest, double relative) {
  std::mt19937 random(5);
  for (const LossConfig& config : all_configs()) {
    for (double temperature : {0.5, 0.05}) {
      for (auto [positives, negatives] :
           {std::pair{1, 1}, {1, 0}, {3, 5}, {2, 0}, {0, 3}, {0, 0}, {1, 60}, {30, 2}}) {
        Row row = draw_row(random, positives, negatives, largest);
        for (double& s : row.s) s = T(s);
        const auto expected = reference::anchor(row.s, row.pairs, config, temperature);
        const auto statistics = statistics_of<T>(row, T(config.beta));
        const auto found = anchor_loss(statistics, config, T(1 / temperature));
        const std::string what = describe(config) + ", " + std::to_string(positives) + " positives, " +
                                 std::to_string(negatives) + " negatives";
        CHECK_EQ(found.is_term, expected.is_term);
        // Debiasing subtracts: what is left may be small, and is as exact as what it came from.
        double condition = 1;
        if (config.debias > 0 && expected.n_neg > 0 && expected.n_pos > 0) {
          const double h = expected.n_neg * expected.wn / expected.w;
          const double left = h - config.debias * expected.n_neg * expected.pos / expected.n_pos;
          condition = std::max(1.0, h / std::abs(left));
        }
        const double tolerance = relative * condition * (2 + config.beta) * (1 + largest);
        check_close(found.value, expected.loss, tolerance * (1 + std::abs(expected.loss)), "loss, " + what);
        check_close(found.d.scale, expected.d_scale, tolerance, "d_scale, " + what);
        double largest_slope = 0;
        for (double slope : expected.ds) largest_slope = std::max(largest_slope, std::abs(slope));
        for (size_t j = 0; j < row.s.size(); ++j) {
          double slope = 0;
          if (found.is_term && row.pairs[j] == Pair::kPositive) {
            slope = positive_gradient(T(row.s[j]), statistics, found.d);
          }
          if (found.is_term && row.pairs[j] == Pair::kNegative) {
            slope = negative_gradient(T(row.s[j]), statistics, found.d, T(config.beta));
          }
          check_close(slope, expected.ds[j], tolerance * condition * (1 + largest_slope), "slope, " + what);
        }
      }
    }
  }
}
TEST("family/loss and gradients, float") {
  test_loss<float>(2.0, 2e-6);
}
TEST("family/loss and gradients, double") {
  test_loss<double>(2.0, 4e-15);
}
TEST("family/loss and gradients, float, large logits") {
  test_loss<float>(100.0, 2e-6);
}
TEST("family/loss and gradients, double, large logits") {
  test_loss<double>(100.0, 4e-15);
}

TEST("family/nothing to compare with") {
  const auto none = statistics_of<float>(Row{}, 1.0f);
  for (LossConfig config : all_configs()) {
    auto nothing = [&](const AnchorLoss<float>& loss) {
      CHECK(!loss.is_term);
      CHECK_EQ(loss.value, 0.0f);
      CHECK_EQ(loss.d.scale, 0.0f);
      for (float d : {loss.d.sum_pos, loss.d.lse_pos, loss.d.lse_w, loss.d.lse_wn}) CHECK_EQ(d, 0.0f);
    };
    nothing(anchor_loss(none, config, 2.0f));
    // Negatives only.
    nothing(anchor_loss(statistics_of<float>(Row{{0.5, 1.0}, {Pair::kNegative, Pair::kNegative}}, 1.0f),
                        config, 2.0f));
    // Positives only: log n_pos ("in"), or the spread of the positives ("out").
    const auto loss = anchor_loss(
        statistics_of<float>(Row{{0.5, 0.5}, {Pair::kPositive, Pair::kPositive}}, 1.0f), config, 2.0f);
    CHECK_EQ(loss.is_term, !config.negatives_only);
    if (loss.is_term) check_close(loss.value, std::log(2.0), 1e-6, "loss of two equal positives");
    CHECK_EQ(loss.d.lse_wn, 0.0f);
  }
}

TEST("family/NaN comes through") {
  for (const LossConfig& config : all_configs()) {
    for (Pair kind : {Pair::kPositive, Pair::kNegative}) {
      Row row{{0.1, 0.2, kNaN, 0.4}, {Pair::kPositive, Pair::kNegative, kind, Pair::kNegative}};
      const auto loss = anchor_loss(statistics_of<float>(row, float(config.beta)), config, 2.0f);
      // At beta 0 the weights are 1 and a NaN negative is seen by lse_wn alone.
      CHECK(std::isnan(loss.value));
    }
  }
}

// High and low part together are as exact as the sum's logarithm, however large the maximum.
TEST("family/logarithms keep what rounding takes") {
  std::mt19937 random(6);
  double one_float = 0;
  for (double beta : {0.5, 0.75, 1.0, 1.25, 2.0}) {
    Row row = draw_row(random, 5, 9, 100.0);
    for (double& s : row.s) s = float(s + 100);
    LossConfig config;
    config.beta = beta;
    const auto a = reference::anchor(row.s, row.pairs, config, 1.0);
    const auto as_float = statistics_of<float>(row, float(beta));
    const auto from_double = rounded<float>(statistics_of<double>(row, beta));
    for (const auto& s : {as_float, from_double}) {
      check_close(double(s.lse_pos) + s.lse_pos_low, std::log(a.pos), 1e-6, "lse_pos");
      check_close(double(s.lse_w) + s.lse_w_low, std::log(a.w), 1e-6, "lse_w");
      check_close(double(s.lse_wn) + s.lse_wn_low, std::log(a.wn), 1e-6, "lse_wn");
    }
    one_float = std::max(one_float, std::abs(double(as_float.lse_wn) - std::log(a.wn)));
  }
  CHECK(one_float > 5e-6);  // it would not have been enough
  const auto empty = rounded<float>(statistics_of<double>(Row{}, 1.0));
  CHECK_EQ(empty.lse_pos, -float(kInf));
  CHECK_EQ(empty.lse_pos_low, 0.0f);
}

TEST("family/bounded logits") {
  CHECK(logits_are_bounded(true, 0.5, 1.0));
  CHECK(logits_are_bounded(true, 0.05, 1.0));
  CHECK(!logits_are_bounded(true, 0.01, 0.0));
  CHECK(!logits_are_bounded(false, 0.5, 1.0));
  // The bound leaves room: a million of the largest terms do not overflow, nor does the smallest vanish.
  CHECK(std::isfinite(1e6f * std::exp(float(kBoundedLogit))));
  CHECK(std::exp(float(-kBoundedLogit)) > std::numeric_limits<float>::min());
}

TEST("family/layout") {
  const int64_t m = 3;
  std::vector<float> memory(kNumStatistics * m, 0.0f);
  const Statistics<float> value{1, 2, 3, 4, 5, 6, 7, 8, 9};
  store_statistics(memory.data(), m, 1, value);
  for (int row = 0; row < kNumStatistics; ++row) {
    for (int64_t i = 0; i < m; ++i) CHECK_EQ(memory[row * m + i], i == 1 ? float(row + 1) : 0.0f);
  }
  const auto back = load_statistics(memory.data(), m, 1);
  CHECK_EQ(back.n_pos, 1.0f);
  CHECK_EQ(back.lse_wn, 6.0f);
  CHECK_EQ(back.lse_wn_low, 9.0f);
  std::vector<float> derivatives(kNumDerivatives * m, 0.0f);
  store_derivatives(derivatives.data(), m, 1, Derivatives<float>{1, 2, 3, 4, 5});
  for (int row = 0; row < kNumDerivatives; ++row) {
    for (int64_t i = 0; i < m; ++i) CHECK_EQ(derivatives[row * m + i], i == 1 ? float(row + 1) : 0.0f);
  }
  const auto d = load_derivatives(derivatives.data(), m, 1);
  CHECK_EQ(d.sum_pos, 1.0f);
  CHECK_EQ(d.lse_wn, 4.0f);
  CHECK_EQ(d.scale, 5.0f);
  CHECK_EQ(padded_dim(0), 0);
  CHECK_EQ(padded_dim(1), 8);
  CHECK_EQ(padded_dim(8), 8);
  CHECK_EQ(padded_dim(300), 304);
}

}  // namespace

TEST_MAIN
