// Where torch begins: the ops torch.ops.clce_ext.*, each made of calls of a backend (calls.h). Their schemas,
// fake kernels and autograd are in Python (clce_ext/ops.py), as is what serves devices without kernels.
//
// torch hands an op's arguments over one by one, in the schema's order: each function below gathers them into
// structs with names at its beginning.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "binding/calls.h"

namespace clce::binding {
namespace {

using OptionalInt = std::optional<int64_t>;
using Guard = c10::OptionalDeviceGuard;

// ---- the whole loss ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_loss_op(
    const Tensor& embeddings, const OptionalTensor& labels, const OptionalTensor& keys,
    const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor, double temperature,
    int64_t views, OptionalInt key_offset, double beta, std::string_view summation,
    std::string_view denominator, const OptionalTensor& debias_tensor, double debias, bool detach_weights,
    bool normalize, int64_t ignore_index, std::string_view reduction) {
  const Guard guard(at::device_of(embeddings));
  const ContrastOptions options{{temperature_tensor, temperature}, views, key_offset, beta, ignore_index};
  check_contrast(embeddings, labels, keys, key_labels, options);
  LossOptions form = loss_options(beta, summation, denominator, debias, detach_weights, reduction);
  form.debias = debias_of_anchors(debias_tensor, embeddings.size(0), dtype_of(embeddings, "embeddings"),
                                  embeddings.device());
  const BackendOnStream backend = backend_for(embeddings);

  const Rows anchors = prepare(backend, embeddings, normalize, "embeddings");
  Rows key_rows{at::empty({0, anchors.z.size(1)}, anchors.z.options()),
                at::empty({0}, anchors.norms.options())};
  OptionalTensor key_z;
  if (keys.has_value()) {
    key_rows = prepare(backend, *keys, normalize, "keys");
    key_z = key_rows.z;
  }
  const Contrast contrast(anchors.z, key_z, labels, key_labels, embeddings.size(1), normalize, options);
  const auto [statistics, loss] = forward(backend, contrast, anchors.z, form);
  return {loss.value, loss.num_terms, statistics, loss.derivatives,
          anchors.z,  anchors.norms,  key_rows.z, key_rows.norms};
}

// By the temperature t. Through the logits: d(1/t) = t sum_i z_i . dz_i over the rows of one side, and d(1/t)
// is -dt / t^2. `dots` are those products; `by_scale` is what the loss takes from 1/t directly.
Tensor temperature_gradient(const Tensor& dots, const Tensor& by_scale, bool symmetric, const Tensor& t) {
  Tensor by_logits = dots.sum(at::kDouble).to(by_scale.scalar_type());
  if (symmetric) by_logits = by_logits / 2;  // dz holds both sides' gradient
  return -(by_logits + by_scale / t) / t;
}

std::tuple<Tensor, Tensor, Tensor> contrastive_loss_backward_op(
    const Tensor& grad_loss, const Tensor& num_terms, const Tensor& statistics, const Tensor& derivatives,
    const Tensor& z, const Tensor& norms, const OptionalTensor& key_z, const OptionalTensor& key_norms,
    const OptionalTensor& labels, const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
    double temperature, int64_t dim, int64_t views, OptionalInt key_offset, double beta, bool normalize,
    int64_t ignore_index, std::string_view reduction, bool need_embeddings, bool need_keys,
    bool need_temperature) {
  const Guard guard(at::device_of(z));
  const ContrastOptions options{{temperature_tensor, temperature}, views, key_offset, beta, ignore_index};
  const Reduction kind = reduction_of(reduction);
  const BackendOnStream backend = backend_for(z);
  const Contrast contrast(z, key_z, labels, key_labels, dim, normalize, options);
  const auto acc = statistics.options();
  const Tensor upstream = grad_loss.to(acc.dtype()).contiguous();

  BackwardArgs args;
  args.contrast = contrast.args;
  args.statistics = statistics.const_data_ptr();
  args.derivatives = derivatives.const_data_ptr();
  args.upstream = upstream.const_data_ptr();
  args.upstream_stride = kind == Reduction::kNone ? 1 : 0;
  args.num_terms = kind == Reduction::kMean ? num_terms.const_data_ptr() : nullptr;

  // The temperature's gradient is a row-wise dot of either side's gradient.
  const bool keys_give_dots = need_temperature && !need_embeddings && need_keys;
  const bool anchors_give_dots = need_temperature && !keys_give_dots;
  const Gradients gradients = backward(backend, args, z, need_embeddings || anchors_give_dots, need_keys);
  const RowsBackward of_anchors = prepare_backward(backend, gradients.danchors, {z, norms}, dim, normalize,
                                                   need_embeddings, anchors_give_dots);
  RowsBackward of_keys;
  if (key_z.has_value() && need_keys) {
    of_keys = prepare_backward(backend, gradients.dkeys, {*key_z, *key_norms}, dim, normalize,
                               /*want_dx=*/true, keys_give_dots);
  } else {
    of_keys.dx = at::empty({0, dim}, z.options());
  }
  Tensor dtemperature = at::empty({0}, acc);
  if (need_temperature) {
    const Tensor of_terms = kind == Reduction::kMean ? upstream / num_terms.clamp_min(1) : upstream;
    const Tensor t =
        contrast.temperature.has_value() ? contrast.temperature->reshape({}) : at::full({}, temperature, acc);
    dtemperature =
        temperature_gradient(keys_give_dots ? of_keys.dots : of_anchors.dots,
                             (derivatives.select(0, kDScale) * of_terms).sum(), contrast.args.symmetric, t);
  }
  return {of_anchors.dx, of_keys.dx, dtemperature};
}

// ---- its parts, for losses whose keys arrive in pieces ----

// Refuses what contrastive_loss refuses, and does nothing else: before anything is sent to other ranks.
void check_arguments_op(const Tensor& embeddings, const OptionalTensor& labels, const OptionalTensor& keys,
                        const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
                        double temperature, int64_t views, OptionalInt key_offset, double beta,
                        std::string_view summation, std::string_view denominator,
                        const OptionalTensor& debias_tensor, double debias, std::string_view reduction) {
  check_contrast(embeddings, labels, keys, key_labels,
                 {{temperature_tensor, temperature}, views, key_offset, beta, /*ignore_index=*/0});
  loss_options(beta, summation, denominator, debias, /*detach_weights=*/false, reduction);
  debias_of_anchors(debias_tensor, embeddings.size(0), dtype_of(embeddings, "embeddings"),
                    embeddings.device());
  backend_for(embeddings);
}

std::tuple<Tensor, Tensor> prepare_op(const Tensor& x, bool normalize) {
  const Guard guard(at::device_of(x));
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have shape [rows, dim], got ", x.sizes());
  dtype_of(x, "x");
  const Rows rows = prepare(backend_for(x), x, normalize, "x");
  return {rows.z, rows.norms};
}

Tensor prepare_backward_op(const Tensor& dz, const Tensor& z, const Tensor& norms, int64_t dim,
                           bool normalize) {
  const Guard guard(at::device_of(z));
  check_prepared(z, {}, dim);
  check_rows_of(z, dz, "dz", {z.size(0), z.size(1)});
  check_rows_of(z, norms, "norms", {normalize ? z.size(0) : 0});
  return prepare_backward(backend_for(z), dz.contiguous(), {z, norms.contiguous()}, dim, normalize,
                          /*want_dx=*/true, /*want_dots=*/false)
      .dx;
}

Tensor statistics_op(const Tensor& z, const OptionalTensor& key_z, const OptionalTensor& labels,
                     const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
                     double temperature, int64_t dim, OptionalInt key_offset, double beta, bool normalized,
                     int64_t ignore_index) {
  const Guard guard(at::device_of(z));
  const ContrastOptions options{
      {temperature_tensor, temperature}, /*views=*/1, key_offset, beta, ignore_index};
  check_prepared(z, key_z, dim);
  check_contrast(z, labels, key_z, key_labels, options);
  const Contrast contrast(z, key_z, labels, key_labels, dim, normalized, options);
  return statistics_of(backend_for(z), contrast, z);
}

std::tuple<Tensor, Tensor, Tensor> loss_from_statistics_op(
    const Tensor& statistics, const OptionalTensor& temperature_tensor, double temperature, double beta,
    std::string_view summation, std::string_view denominator, const OptionalTensor& debias_tensor,
    double debias, bool detach_weights, std::string_view reduction) {
  const Guard guard(at::device_of(statistics));
  TORCH_CHECK_VALUE(statistics.dim() == 2 && statistics.size(0) == kNumStatistics,
                    "statistics must have shape [", kNumStatistics, ", anchors], got ", statistics.sizes());
  const DType dtype = dtype_of(statistics, "statistics");
  TORCH_CHECK_TYPE(dtype == DType::kFloat32 || dtype == DType::kFloat64,
                   "statistics must be float32 or float64, got ", statistics.scalar_type());
  const Temperature t{temperature_tensor, temperature};
  check_temperature(t, statistics.device());
  LossOptions options = loss_options(beta, summation, denominator, debias, detach_weights, reduction);
  options.debias = debias_of_anchors(debias_tensor, statistics.size(1), dtype, statistics.device());
  const Loss loss = loss_of(backend_for(statistics), statistics, t, options);
  return {loss.value, loss.num_terms, loss.derivatives};
}

std::tuple<Tensor, Tensor> statistics_backward_op(
    const Tensor& derivatives, const Tensor& statistics, const Tensor& z, const OptionalTensor& key_z,
    const OptionalTensor& labels, const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
    double temperature, int64_t dim, OptionalInt key_offset, double beta, bool normalized,
    int64_t ignore_index, bool need_anchors, bool need_keys) {
  const Guard guard(at::device_of(z));
  const ContrastOptions options{
      {temperature_tensor, temperature}, /*views=*/1, key_offset, beta, ignore_index};
  check_prepared(z, key_z, dim);
  check_contrast(z, labels, key_z, key_labels, options);
  check_rows_of(z, statistics, "statistics", {kNumStatistics, z.size(0)});
  check_rows_of(z, derivatives, "derivatives", {kNumDerivatives, z.size(0)});
  const Contrast contrast(z, key_z, labels, key_labels, dim, normalized, options);
  const Tensor s = statistics.contiguous(), d = derivatives.contiguous();
  BackwardArgs args;
  args.contrast = contrast.args;
  args.statistics = s.const_data_ptr();
  args.derivatives = d.const_data_ptr();
  const Gradients gradients = backward(backend_for(z), args, z, need_anchors, need_keys);
  return {gradients.danchors, gradients.dkeys};
}

// Registers what runs an op: one function on every device with kernels, as backend_for() looks at the
// tensors.
template <class Function>
void serve(torch::Library& library, const char* name, Function* function) {
  for (const at::DeviceType type : device_types()) library.impl(name, torch::dispatch(type, function));
}

}  // namespace

// The schemas are in clce_ext/ops.py, which has the ops where nothing is compiled too.
TORCH_LIBRARY_FRAGMENT(clce_ext, library) {
  serve(library, "contrastive_loss", contrastive_loss_op);
  serve(library, "contrastive_loss_backward", contrastive_loss_backward_op);
  serve(library, "check_arguments", check_arguments_op);
  serve(library, "prepare", prepare_op);
  serve(library, "prepare_backward", prepare_backward_op);
  serve(library, "statistics", statistics_op);
  serve(library, "loss_from_statistics", loss_from_statistics_op);
  serve(library, "statistics_backward", statistics_backward_op);
}

}  // namespace clce::binding
