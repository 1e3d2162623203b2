#include "binding/calls.h"

#include <utility>

namespace clce::binding {
namespace {

const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

Tensor workspace(size_t bytes, const Tensor& like) {
  return empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, like);
}

OptionalTensor as_int64(const OptionalTensor& labels) {
  if (!labels.has_value()) return {};
  return contiguous_as(*labels, ScalarType::Long);
}

OptionalTensor as_acc(const OptionalTensor& numbers, DType dtype) {
  if (!numbers.has_value()) return {};
  return contiguous_as(*numbers, acc_type(dtype));
}

// Of a tensor on the CPU, in the accumulation type.
double item(const Tensor& tensor, DType dtype) {
  const void* data = tensor.const_data_ptr();
  return dtype == DType::kFloat64 ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
}

// `temperature` is the number that counts where `on_device` holds nothing.
LossArgs loss_args(DType dtype, int64_t num_anchors, const LossOptions& options, double temperature,
                   const OptionalTensor& on_device) {
  LossArgs args;
  args.dtype = dtype;
  args.num_anchors = num_anchors;
  args.config = options.config;
  args.debias = data_or_null(options.debias);
  args.reduction = options.reduction;
  args.temperature = temperature;
  args.temperature_ptr = data_or_null(on_device);
  return args;
}

// What only the backend's device tells of the contrast.
void use_backend(ContrastArgs& args, const BackendOnDevice& backend) {
  const Switches now = switches();
  args.engine = now.engine;
  args.allow_tf32 = now.allow_tf32 && args.dtype == DType::kFloat32;
  args.product = backend.product;
}

// Allocates what the loss gives, on the device of `like`, and makes `args` point to it.
Loss new_loss(LossArgs& args, const Tensor& like) {
  const ScalarType acc = acc_type(args.dtype);
  const bool each = args.reduction == Reduction::kNone;
  Loss loss{each ? empty({args.num_anchors}, acc, like) : empty({}, acc, like), empty({}, acc, like),
            empty({kNumDerivatives, args.num_anchors}, acc, like)};
  args.loss = loss.value.mutable_data_ptr();
  args.num_terms = loss.num_terms.mutable_data_ptr();
  args.derivatives = loss.derivatives.mutable_data_ptr();
  return loss;
}

// Fills in the contrast, the statistics and the workspace, and calls forward.
Tensor run_forward(const BackendOnDevice& backend, ForwardArgs& args, const Contrast& contrast,
                   const Tensor& z) {
  args.contrast = contrast.args;
  use_backend(args.contrast, backend);
  Tensor statistics = empty({kNumStatistics, contrast.args.num_anchors}, acc_type(contrast.args.dtype), z);
  args.statistics = statistics.mutable_data_ptr();
  args.loss.statistics = args.statistics;
  const Tensor scratch = workspace(backend.forward_workspace_bytes(args.contrast), z);
  args.workspace = scratch.mutable_data_ptr();
  backend.forward(args, backend.stream);
  return statistics;
}

}  // namespace

Reduction reduction_of(std::string_view name) {
  return name == "none" ? Reduction::kNone : name == "sum" ? Reduction::kSum : Reduction::kMean;
}

LossOptions loss_options(DType dtype, double beta, std::string_view summation, std::string_view denominator,
                         const TensorOrNumber& debias, bool detach_weights, std::string_view reduction) {
  LossOptions options;
  LossConfig& config = options.config;
  config.beta = beta;
  config.debias = debias.number;
  config.mean_inside_log = summation == "in";
  config.negatives_only = denominator == "negatives";
  config.detach_weights = detach_weights;
  options.reduction = reduction_of(reduction);
  options.debias = as_acc(debias.tensor, dtype);
  return options;
}

Rows rows_for(const Tensor& x, bool normalize, PrepareArgs& args) {
  args.dtype = dtype_of(x);
  args.rows = x.size(0);
  args.dim = x.size(1);
  args.x = x.const_data_ptr();
  args.x_row_stride = x.stride(0);
  args.x_col_stride = x.stride(1);
  args.normalize = normalize;
  Tensor z = empty({args.rows, padded_dim(args.dim)}, scalar_type(args.dtype), x);
  Tensor norms = empty({normalize ? args.rows : 0}, acc_type(args.dtype), x);
  args.z = z.mutable_data_ptr();
  args.norms = norms.mutable_data_ptr();
  return {z, norms};
}

Rows prepare(const BackendOnDevice& backend, const Tensor& x, bool normalize) {
  PrepareArgs args;
  Rows rows = rows_for(x, normalize, args);
  if (args.rows > 0) backend.prepare(args, backend.stream);
  return rows;
}

RowsBackward rows_backward_for(const Rows& rows, int64_t dim, bool normalize, bool want_dx, bool want_dots,
                               PrepareBackwardArgs& args) {
  args.dtype = dtype_of(rows.z);
  args.rows = rows.z.size(0);
  args.dim = dim;
  args.z = rows.z.const_data_ptr();
  args.norms = rows.norms.const_data_ptr();
  args.normalize = normalize;
  Tensor dx = empty({want_dx ? args.rows : 0, dim}, scalar_type(args.dtype), rows.z);
  Tensor dots = empty({want_dots ? args.rows : 0}, acc_type(args.dtype), rows.z);
  args.dx = want_dx ? dx.mutable_data_ptr() : nullptr;
  args.dots = want_dots ? dots.mutable_data_ptr() : nullptr;
  return {dx, dots};
}

RowsBackward prepare_backward(const BackendOnDevice& backend, const Tensor& dz, const Rows& rows, int64_t dim,
                              bool normalize, bool want_dx, bool want_dots) {
  PrepareBackwardArgs args;
  RowsBackward result = rows_backward_for(rows, dim, normalize, want_dx, want_dots, args);
  args.dz = dz.const_data_ptr();
  if (args.rows > 0 && (want_dx || want_dots)) backend.prepare_backward(args, backend.stream);
  return result;
}

Contrast::Contrast(const Tensor& z, const OptionalTensor& key_z, const OptionalTensor& labels,
                   const OptionalTensor& key_labels, int64_t dim, bool normalized,
                   const ContrastOptions& options)
    : labels(as_int64(labels)),
      key_labels(as_int64(key_labels)),
      temperature(as_acc(options.temperature.tensor, dtype_of(z))) {
  const Tensor& keys = key_z.has_value() ? *key_z : z;
  args.dtype = dtype_of(z);
  args.num_anchors = z.size(0);
  args.num_keys = keys.size(0);
  args.dim = dim;
  args.stride = z.size(1);
  args.anchors = z.const_data_ptr();
  args.keys = keys.const_data_ptr();
  args.symmetric = !key_z.has_value();
  args.anchor_labels = static_cast<const int64_t*>(data_or_null(this->labels));
  args.key_labels =
      args.symmetric ? args.anchor_labels : static_cast<const int64_t*>(data_or_null(this->key_labels));
  args.views = options.views;
  args.key_views = args.symmetric ? options.views : 1;
  args.ignore_index = options.ignore_index;
  args.has_self = args.symmetric || options.key_offset.has_value();
  args.self_offset = options.key_offset.value_or(0);
  args.temperature = options.temperature.number;
  args.temperature_ptr = data_or_null(temperature);
  args.beta = options.beta;
  if (!temperature.has_value()) {
    args.bounded = logits_are_bounded(normalized, args.temperature, args.beta);
  } else if (z.is_cpu()) {  // elsewhere reading it would wait for the device
    args.bounded = logits_are_bounded(normalized, item(*temperature, args.dtype), args.beta);
  } else {
    args.bounded = normalized;
  }
}

Tensor statistics_of(const BackendOnDevice& backend, const Contrast& contrast, const Tensor& z) {
  ForwardArgs args;
  return run_forward(backend, args, contrast, z);
}

std::pair<Tensor, Loss> forward(const BackendOnDevice& backend, const Contrast& contrast, const Tensor& z,
                                const LossOptions& options, const PrepareArgs& anchors,
                                const PrepareArgs& keys) {
  ForwardArgs args;
  args.prepare_anchors = anchors;
  args.prepare_keys = keys;
  args.with_loss = true;
  args.loss = loss_args(contrast.args.dtype, contrast.args.num_anchors, options, contrast.args.temperature,
                        contrast.temperature);
  Loss loss = new_loss(args.loss, z);
  Tensor statistics = run_forward(backend, args, contrast, z);
  return {std::move(statistics), std::move(loss)};
}

Loss loss_of(const BackendOnDevice& backend, const Tensor& statistics, const TensorOrNumber& temperature,
             const LossOptions& options) {
  const DType dtype = dtype_of(statistics);
  const Tensor numbers = contiguous_as(statistics, acc_type(dtype));
  const OptionalTensor on_device = as_acc(temperature.tensor, dtype);
  LossArgs args = loss_args(dtype, numbers.size(1), options, temperature.number, on_device);
  args.statistics = numbers.const_data_ptr();
  Loss loss = new_loss(args, numbers);
  backend.loss(args, backend.stream);
  return loss;
}

Gradients backward(const BackendOnDevice& backend, BackwardArgs args, const Tensor& z, bool want_anchors,
                   bool want_keys) {
  use_backend(args.contrast, backend);
  const ContrastArgs& contrast = args.contrast;
  const ScalarType acc = acc_type(contrast.dtype);
  want_keys = want_keys && !contrast.symmetric;
  Tensor danchors = empty({want_anchors ? contrast.num_anchors : 0, contrast.stride}, acc, z);
  Tensor dkeys = empty({want_keys ? contrast.num_keys : 0, contrast.stride}, acc, z);
  args.danchors = want_anchors ? danchors.mutable_data_ptr() : nullptr;
  args.dkeys = want_keys ? dkeys.mutable_data_ptr() : nullptr;
  const Tensor scratch = workspace(backend.backward_workspace_bytes(contrast), z);
  args.workspace = scratch.mutable_data_ptr();
  if (want_anchors || want_keys) backend.backward(args, backend.stream);
  return {danchors, dkeys};
}

Tensor temperature_gradient(const BackendOnDevice& backend, const BackwardArgs& given, const Tensor& dots) {
  Tensor gradient = empty({}, acc_type(given.contrast.dtype), dots);
  TemperatureGradientArgs args;
  args.given = given;
  args.dots = dots.const_data_ptr();
  args.rows = dots.size(0);
  args.gradient = gradient.mutable_data_ptr();
  backend.temperature_gradient(args, backend.stream);
  return gradient;
}

}  // namespace clce::binding
