// The loss on the CPU: the family's formula (family/loss.h) for every anchor, and the reduction.
#include <algorithm>

#include "backend.h"
#include "cpu/contrast.h"
#include "dispatch.h"

namespace clce::cpu {
namespace {

template <class T>
void loss_as(const LossArgs& args) {
  const int64_t rows = args.num_anchors;
  const T* statistics = static_cast<const T*>(args.statistics);
  T* derivatives = static_cast<T*>(args.derivatives);
  const T* debias = static_cast<const T*>(args.debias);
  T* out = static_cast<T*>(args.loss);
  const T scale = T(1 / temperature_of<T>(args));
  LossConfig config = args.config;
  double sum = 0, terms = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (debias) config.debias = debias[row];
    const AnchorLoss<T> term = anchor_loss(load_statistics(statistics, rows, row), config, scale);
    store_derivatives(derivatives, rows, row, term.d);
    sum += term.value;
    terms += term.is_term;
    if (args.reduction == Reduction::kNone) out[row] = term.value;
  }
  if (args.reduction == Reduction::kSum) out[0] = static_cast<T>(sum);
  if (args.reduction == Reduction::kMean) out[0] = static_cast<T>(sum / std::max(terms, 1.0));
  *static_cast<T*>(args.num_terms) = static_cast<T>(terms);
}

template <class T>
void temperature_gradient_as(const TemperatureGradientArgs& args) {
  const BackwardArgs& given = args.given;
  const int64_t anchors = given.contrast.num_anchors;
  const T* dots = static_cast<const T*>(args.dots);
  const T* by_scale = static_cast<const T*>(given.derivatives) + kDScale * anchors;
  const T* upstream = static_cast<const T*>(given.upstream);
  double sum = 0, direct = 0;
  for (int64_t row = 0; row < args.rows; ++row) sum += dots[row];
  for (int64_t row = 0; row < anchors; ++row) {
    direct += double(by_scale[row]) * (upstream ? upstream[row * given.upstream_stride] : T(1));
  }
  if (given.num_terms) direct /= std::max(*static_cast<const T*>(given.num_terms), T(1));
  *static_cast<T*>(args.gradient) = static_cast<T>(
      gradient_by_temperature(sum, given.contrast.symmetric, direct, temperature_of<T>(given.contrast)));
}

}  // namespace

void loss(const LossArgs& args, void*) {
  with_accumulation_type(args.dtype, [&](auto acc) { loss_as<decltype(acc)>(args); });
}

void temperature_gradient(const TemperatureGradientArgs& args, void*) {
  with_accumulation_type(args.given.contrast.dtype,
                         [&](auto acc) { temperature_gradient_as<decltype(acc)>(args); });
}

}  // namespace clce::cpu
