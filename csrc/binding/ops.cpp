// Where torch begins: torch.ops.clce_ext.*, the schemas and what each does with a backend's functions.
// Autograd and fake kernels are in Python (clce_ext/ops.py).
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "binding/checks.h"

#if defined(CLCE_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

namespace clce::binding {
namespace {

struct Backend {
#define CLCE_POINTER(name) decltype(&cpu::name) name
  CLCE_POINTER(prepare);
  CLCE_POINTER(prepare_backward);
  CLCE_POINTER(forward_workspace_bytes);
  CLCE_POINTER(forward);
  CLCE_POINTER(loss);
  CLCE_POINTER(backward_workspace_bytes);
  CLCE_POINTER(backward);
#undef CLCE_POINTER
  void* stream = nullptr;
};

#define CLCE_BACKEND(ns)                                                                   \
  Backend {                                                                                \
    ns::prepare, ns::prepare_backward, ns::forward_workspace_bytes, ns::forward, ns::loss, \
        ns::backward_workspace_bytes, ns::backward                                         \
  }

Backend backend_for(const Tensor& tensor) {
  if (tensor.is_cpu()) return CLCE_BACKEND(cpu);
#if defined(CLCE_CUDA)
  Backend backend = CLCE_BACKEND(cuda);
  backend.stream = c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
  return backend;
#else
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "embeddings are on ", tensor.device(),
      " but this clce_ext was built without CUDA kernels; clce_ext.build_info() tells more");
#endif
}

const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->const_data_ptr() : nullptr;
}

Tensor workspace(size_t bytes, const Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// Labels and temperature in the form the kernels read, kept alive while they run.
struct Inputs {
  Inputs(const OptionalTensor& labels, const OptionalTensor& key_labels, const ContrastOptions& options,
         DType dtype)
      : labels(as_int64(labels)), key_labels(as_int64(key_labels)) {
    if (options.temperature_tensor.has_value()) {
      temperature = options.temperature_tensor->detach().to(acc_type(dtype)).contiguous();
    }
  }
  static OptionalTensor as_int64(const OptionalTensor& labels) {
    if (!labels.has_value()) return {};
    return labels->to(at::kLong).contiguous();
  }
  OptionalTensor labels, key_labels, temperature;
};

// z [M, padded dim] (and key_z) as a contrast; `normalized` says that their rows have length <= 1.
ContrastArgs contrast_args(const Tensor& z, const OptionalTensor& key_z, int64_t dim, bool normalized,
                           const ContrastOptions& options, const Inputs& inputs) {
  ContrastArgs args;
  args.dtype = dtype_of(z, "embeddings");
  args.num_anchors = z.size(0);
  args.num_keys = key_z.has_value() ? key_z->size(0) : z.size(0);
  args.dim = dim;
  args.stride = z.size(1);
  args.anchors = z.const_data_ptr();
  args.keys = key_z.has_value() ? key_z->const_data_ptr() : z.const_data_ptr();
  args.symmetric = !key_z.has_value();
  args.anchor_labels = static_cast<const int64_t*>(data_or_null(inputs.labels));
  args.key_labels =
      args.symmetric ? args.anchor_labels : static_cast<const int64_t*>(data_or_null(inputs.key_labels));
  args.views = options.views;
  args.key_views = args.symmetric ? options.views : 1;
  args.ignore_index = options.ignore_index;
  args.has_self = args.symmetric || options.key_offset.has_value();
  args.self_offset = options.key_offset.value_or(0);
  args.temperature = options.temperature;
  args.temperature_ptr = data_or_null(inputs.temperature);
  args.beta = options.beta;
  if (args.temperature_ptr == nullptr) {
    args.bounded = logits_are_bounded(normalized, args.temperature, args.beta);
  } else if (z.is_cpu()) {
    args.bounded = logits_are_bounded(normalized, inputs.temperature->item<double>(), args.beta);
  }
  // As at::mm asks; allowTF32CuBLAS() throws where the older and the newer switches of torch were both used.
  args.allow_tf32 = z.is_cuda() && args.dtype == DType::kFloat32 &&
                    at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                        at::Float32Precision::TF32;
  return args;
}

std::tuple<Tensor, Tensor> prepare_rows(const Backend& backend, const Tensor& x, bool normalize,
                                        const char* name) {
  PrepareArgs args;
  args.dtype = dtype_of(x, name);
  args.rows = x.size(0);
  args.dim = x.size(1);
  args.x = x.const_data_ptr();
  args.x_row_stride = x.stride(0);
  args.x_col_stride = x.stride(1);
  args.normalize = normalize;
  Tensor z = at::empty({args.rows, padded_dim(args.dim)}, x.options());
  Tensor norms = at::empty({normalize ? args.rows : 0}, x.options().dtype(acc_type(args.dtype)));
  args.z = z.mutable_data_ptr();
  args.norms = norms.mutable_data_ptr();
  if (args.rows > 0) backend.prepare(args, backend.stream);
  return {z, norms};
}

// The gradient of x, and z . dz per row where wanted.
std::tuple<Tensor, Tensor> prepare_rows_backward(const Backend& backend, const Tensor& dz, const Tensor& z,
                                                 const Tensor& norms, int64_t dim, bool normalize,
                                                 bool want_dx, bool want_dots) {
  PrepareBackwardArgs args;
  args.dtype = dtype_of(z, "embeddings");
  args.rows = z.size(0);
  args.dim = dim;
  args.z = z.const_data_ptr();
  args.norms = norms.const_data_ptr();
  args.dz = dz.const_data_ptr();
  args.normalize = normalize;
  Tensor dx = at::empty({want_dx ? args.rows : 0, dim}, z.options());
  Tensor dots = at::empty({want_dots ? args.rows : 0}, dz.options());
  args.dx = want_dx ? dx.mutable_data_ptr() : nullptr;
  args.dots = want_dots ? dots.mutable_data_ptr() : nullptr;
  if (args.rows > 0 && (want_dx || want_dots)) backend.prepare_backward(args, backend.stream);
  return {dx, dots};
}

LossArgs loss_args(DType dtype, int64_t num_anchors, const LossConfig& config, Reduction reduction,
                   double temperature, const void* temperature_ptr) {
  LossArgs args;
  args.dtype = dtype;
  args.num_anchors = num_anchors;
  args.config = config;
  args.reduction = reduction;
  args.temperature = temperature;
  args.temperature_ptr = temperature_ptr;
  return args;
}

// loss [] or [M], num_terms [], derivatives [5, M]
std::tuple<Tensor, Tensor, Tensor> loss_outputs(LossArgs& args, const at::TensorOptions& options) {
  Tensor loss =
      args.reduction == Reduction::kNone ? at::empty({args.num_anchors}, options) : at::empty({}, options);
  Tensor num_terms = at::empty({}, options);
  Tensor derivatives = at::empty({kNumDerivatives, args.num_anchors}, options);
  args.loss = loss.mutable_data_ptr();
  args.num_terms = num_terms.mutable_data_ptr();
  args.derivatives = derivatives.mutable_data_ptr();
  return {loss, num_terms, derivatives};
}

Tensor run_forward(const Backend& backend, const ContrastArgs& contrast, const LossArgs* loss,
                   const Tensor& z) {
  ForwardArgs args;
  args.contrast = contrast;
  Tensor statistics =
      at::empty({kNumStatistics, contrast.num_anchors}, z.options().dtype(acc_type(contrast.dtype)));
  args.statistics = statistics.mutable_data_ptr();
  if (loss != nullptr) {
    args.with_loss = true;
    args.loss = *loss;
    args.loss.statistics = args.statistics;
  }
  const Tensor scratch = workspace(backend.forward_workspace_bytes(contrast), z);
  args.workspace = scratch.data_ptr();
  backend.forward(args, backend.stream);
  return statistics;
}

// dz [M, stride], dkeys [N, stride] in the accumulation type; an unwanted one has no rows.
std::tuple<Tensor, Tensor> run_backward(const Backend& backend, BackwardArgs& args, const Tensor& z,
                                        bool want_anchors, bool want_keys) {
  const ContrastArgs& contrast = args.contrast;
  const auto options = z.options().dtype(acc_type(contrast.dtype));
  want_keys = want_keys && !contrast.symmetric;
  Tensor danchors = at::empty({want_anchors ? contrast.num_anchors : 0, contrast.stride}, options);
  Tensor dkeys = at::empty({want_keys ? contrast.num_keys : 0, contrast.stride}, options);
  args.danchors = want_anchors ? danchors.mutable_data_ptr() : nullptr;
  args.dkeys = want_keys ? dkeys.mutable_data_ptr() : nullptr;
  const Tensor scratch = workspace(backend.backward_workspace_bytes(contrast), z);
  args.workspace = scratch.data_ptr();
  if (want_anchors || want_keys) backend.backward(args, backend.stream);
  return {danchors, dkeys};
}

// By the temperature t. Through the logits: d(1/t) = t sum_i z_i . dz_i over the rows of one side, and d(1/t)
// is -dt / t^2. `dots` are those products; `by_scale` is what the loss takes from 1/t directly.
Tensor temperature_gradient(const Tensor& dots, const Tensor& by_scale, bool symmetric, const Tensor& t) {
  Tensor by_logits = dots.sum(at::kDouble).to(by_scale.scalar_type());
  if (symmetric) by_logits = by_logits / 2;  // dz holds both sides' gradient
  return -(by_logits + by_scale / t) / t;
}

// ---- the whole loss ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_loss(
    const Tensor& embeddings, const OptionalTensor& labels, const OptionalTensor& keys,
    const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor, double temperature,
    int64_t views, std::optional<int64_t> key_offset, double beta, std::string_view summation,
    std::string_view denominator, double debias, bool detach_weights, bool normalize, int64_t ignore_index,
    std::string_view reduction) {
  const c10::OptionalDeviceGuard guard(at::device_of(embeddings));
  const ContrastOptions options{temperature_tensor, temperature, views, key_offset, beta, ignore_index};
  check_contrast(embeddings, labels, keys, key_labels, options);
  const LossConfig config =
      loss_config(beta, std::string(summation), std::string(denominator), debias, detach_weights);
  const Backend backend = backend_for(embeddings);
  const Inputs inputs(labels, key_labels, options, dtype_of(embeddings, "embeddings"));

  auto [z, norms] = prepare_rows(backend, embeddings, normalize, "embeddings");
  OptionalTensor key_z;
  Tensor key_rows = at::empty({0, z.size(1)}, z.options()), key_norms = at::empty({0}, norms.options());
  if (keys.has_value()) {
    std::tie(key_rows, key_norms) = prepare_rows(backend, *keys, normalize, "keys");
    key_z = key_rows;
  }
  const ContrastArgs contrast = contrast_args(z, key_z, embeddings.size(1), normalize, options, inputs);
  LossArgs args = loss_args(contrast.dtype, contrast.num_anchors, config,
                            reduction_of(std::string(reduction)), temperature, contrast.temperature_ptr);
  auto [loss, num_terms, derivatives] = loss_outputs(args, z.options().dtype(acc_type(contrast.dtype)));
  Tensor statistics = run_forward(backend, contrast, &args, z);
  return {loss, num_terms, statistics, derivatives, z, norms, key_rows, key_norms};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_loss_backward(
    const Tensor& grad_loss, const Tensor& num_terms, const Tensor& statistics, const Tensor& derivatives,
    const Tensor& z, const Tensor& norms, const OptionalTensor& key_z, const OptionalTensor& key_norms,
    const OptionalTensor& labels, const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
    double temperature, int64_t dim, int64_t views, std::optional<int64_t> key_offset, double beta,
    bool normalize, int64_t ignore_index, std::string_view reduction, bool need_embeddings, bool need_keys,
    bool need_temperature) {
  const c10::OptionalDeviceGuard guard(at::device_of(z));
  const Backend backend = backend_for(z);
  const ContrastOptions options{temperature_tensor, temperature, views, key_offset, beta, ignore_index};
  const Inputs inputs(labels, key_labels, options, dtype_of(z, "embeddings"));
  const Reduction kind = reduction_of(std::string(reduction));
  const auto acc = statistics.options();
  const Tensor grad = grad_loss.to(acc.dtype()).contiguous();

  BackwardArgs args;
  args.contrast = contrast_args(z, key_z, dim, normalize, options, inputs);
  args.statistics = statistics.const_data_ptr();
  args.derivatives = derivatives.const_data_ptr();
  args.grad_loss = grad.const_data_ptr();
  args.grad_stride = kind == Reduction::kNone ? 1 : 0;
  args.num_terms = kind == Reduction::kMean ? num_terms.const_data_ptr() : nullptr;

  // The temperature's gradient is a row-wise dot of either side's gradient.
  const bool keys_give_dots = need_temperature && !need_embeddings && need_keys;
  const bool anchors_give_dots = need_temperature && !keys_give_dots;
  const auto [dz, dkeys] = run_backward(backend, args, z, need_embeddings || anchors_give_dots, need_keys);
  Tensor dx, dots, dk, key_dots;
  std::tie(dx, dots) =
      prepare_rows_backward(backend, dz, z, norms, dim, normalize, need_embeddings, anchors_give_dots);
  if (key_z.has_value() && need_keys) {
    std::tie(dk, key_dots) =
        prepare_rows_backward(backend, dkeys, *key_z, *key_norms, dim, normalize, true, keys_give_dots);
  } else {
    dk = at::empty({0, dim}, z.options());
  }
  Tensor dtemperature = at::empty({0}, acc);
  if (need_temperature) {
    Tensor weights = kind == Reduction::kMean ? grad / num_terms.clamp_min(1) : grad;
    const Tensor by_scale = (derivatives.select(0, kDScale) * weights).sum();
    const Tensor t =
        inputs.temperature.has_value() ? inputs.temperature->reshape({}) : at::full({}, temperature, acc);
    dtemperature =
        temperature_gradient(keys_give_dots ? key_dots : dots, by_scale, args.contrast.symmetric, t);
  }
  return {dx, dk, dtemperature};
}

// ---- its parts, for losses whose keys arrive in pieces ----

// Refuses what contrastive_loss refuses, and does nothing else: before anything is sent to other ranks.
void check_arguments(const Tensor& embeddings, const OptionalTensor& labels, const OptionalTensor& keys,
                     const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
                     double temperature, int64_t views, std::optional<int64_t> key_offset, double beta,
                     std::string_view summation, std::string_view denominator, double debias,
                     std::string_view reduction) {
  check_contrast(embeddings, labels, keys, key_labels,
                 {temperature_tensor, temperature, views, key_offset, beta, /*ignore_index=*/0});
  loss_config(beta, std::string(summation), std::string(denominator), debias, false);
  reduction_of(std::string(reduction));
  backend_for(embeddings);
}

std::tuple<Tensor, Tensor> prepare_op(const Tensor& x, bool normalize) {
  const c10::OptionalDeviceGuard guard(at::device_of(x));
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have shape [rows, dim], got ", x.sizes());
  dtype_of(x, "x");
  return prepare_rows(backend_for(x), x, normalize, "x");
}

Tensor prepare_backward_op(const Tensor& dz, const Tensor& z, const Tensor& norms, int64_t dim,
                           bool normalize) {
  const c10::OptionalDeviceGuard guard(at::device_of(z));
  check_prepared(z, {}, dim);
  check_rows_of(z, dz, "dz", {z.size(0), z.size(1)});
  check_rows_of(z, norms, "norms", {normalize ? z.size(0) : 0});
  return std::get<0>(prepare_rows_backward(backend_for(z), dz.contiguous(), z, norms.contiguous(), dim,
                                           normalize, true, false));
}

Tensor statistics_op(const Tensor& z, const OptionalTensor& key_z, const OptionalTensor& labels,
                     const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
                     double temperature, int64_t dim, std::optional<int64_t> key_offset, double beta,
                     bool normalized, int64_t ignore_index) {
  const c10::OptionalDeviceGuard guard(at::device_of(z));
  const ContrastOptions options{temperature_tensor, temperature, 1, key_offset, beta, ignore_index};
  check_prepared(z, key_z, dim);
  check_contrast(z, labels, key_z, key_labels, options);
  const Backend backend = backend_for(z);
  const Inputs inputs(labels, key_labels, options, dtype_of(z, "z"));
  return run_forward(backend, contrast_args(z, key_z, dim, normalized, options, inputs), nullptr, z);
}

std::tuple<Tensor, Tensor, Tensor> loss_from_statistics(const Tensor& statistics,
                                                        const OptionalTensor& temperature_tensor,
                                                        double temperature, double beta,
                                                        std::string_view summation,
                                                        std::string_view denominator, double debias,
                                                        bool detach_weights, std::string_view reduction) {
  const c10::OptionalDeviceGuard guard(at::device_of(statistics));
  TORCH_CHECK_VALUE(statistics.dim() == 2 && statistics.size(0) == kNumStatistics,
                    "statistics must have shape [", kNumStatistics, ", anchors], got ", statistics.sizes());
  const DType dtype = dtype_of(statistics, "statistics");
  TORCH_CHECK_TYPE(dtype == DType::kFloat32 || dtype == DType::kFloat64,
                   "statistics must be float32 or float64, got ", statistics.scalar_type());
  check_temperature(temperature_tensor, temperature, statistics.device());
  const Backend backend = backend_for(statistics);
  const Tensor in = statistics.contiguous();
  const Inputs inputs({}, {}, {temperature_tensor, temperature, 1, {}, beta, 0}, dtype);
  LossArgs args =
      loss_args(dtype, in.size(1),
                loss_config(beta, std::string(summation), std::string(denominator), debias, detach_weights),
                reduction_of(std::string(reduction)), temperature, data_or_null(inputs.temperature));
  auto outputs = loss_outputs(args, in.options());
  args.statistics = in.const_data_ptr();
  backend.loss(args, backend.stream);
  return outputs;
}

std::tuple<Tensor, Tensor> statistics_backward(const Tensor& derivatives, const Tensor& statistics,
                                               const Tensor& z, const OptionalTensor& key_z,
                                               const OptionalTensor& labels, const OptionalTensor& key_labels,
                                               const OptionalTensor& temperature_tensor, double temperature,
                                               int64_t dim, std::optional<int64_t> key_offset, double beta,
                                               bool normalized, int64_t ignore_index, bool need_anchors,
                                               bool need_keys) {
  const c10::OptionalDeviceGuard guard(at::device_of(z));
  const ContrastOptions options{temperature_tensor, temperature, 1, key_offset, beta, ignore_index};
  check_prepared(z, key_z, dim);
  check_contrast(z, labels, key_z, key_labels, options);
  check_rows_of(z, statistics, "statistics", {kNumStatistics, z.size(0)});
  check_rows_of(z, derivatives, "derivatives", {kNumDerivatives, z.size(0)});
  const Backend backend = backend_for(z);
  const Inputs inputs(labels, key_labels, options, dtype_of(z, "z"));
  const Tensor s = statistics.contiguous(), d = derivatives.contiguous();
  BackwardArgs args;
  args.contrast = contrast_args(z, key_z, dim, normalized, options, inputs);
  args.statistics = s.const_data_ptr();
  args.derivatives = d.const_data_ptr();
  return run_backward(backend, args, z, need_anchors, need_keys);
}

}  // namespace

TORCH_LIBRARY(clce_ext, m) {
  m.def(
      "contrastive_loss(Tensor embeddings, Tensor? labels, Tensor? keys, Tensor? key_labels, "
      "Tensor? temperature_tensor, float temperature, int views, int? key_offset, float beta, str summation, "
      "str denominator, float debias, bool detach_weights, bool normalize, int ignore_index, str reduction) "
      "-> "
      "(Tensor loss, Tensor num_terms, Tensor statistics, Tensor derivatives, Tensor z, Tensor norms, "
      "Tensor key_z, Tensor key_norms)");
  m.def(
      "contrastive_loss_backward(Tensor grad_loss, Tensor num_terms, Tensor statistics, Tensor derivatives, "
      "Tensor z, Tensor norms, Tensor? key_z, Tensor? key_norms, Tensor? labels, Tensor? key_labels, "
      "Tensor? temperature_tensor, float temperature, SymInt dim, int views, int? key_offset, float beta, "
      "bool normalize, int ignore_index, str reduction, bool need_embeddings, bool need_keys, "
      "bool need_temperature) -> (Tensor embeddings, Tensor keys, Tensor temperature)");
  m.def(
      "check_arguments(Tensor embeddings, Tensor? labels, Tensor? keys, Tensor? key_labels, "
      "Tensor? temperature_tensor, float temperature, int views, int? key_offset, float beta, str summation, "
      "str denominator, float debias, str reduction) -> ()");
  m.def("prepare(Tensor x, bool normalize) -> (Tensor z, Tensor norms)");
  m.def("prepare_backward(Tensor dz, Tensor z, Tensor norms, SymInt dim, bool normalize) -> Tensor");
  m.def(
      "statistics(Tensor z, Tensor? key_z, Tensor? labels, Tensor? key_labels, Tensor? temperature_tensor, "
      "float temperature, SymInt dim, int? key_offset, float beta, bool normalized, int ignore_index) -> "
      "Tensor");
  m.def(
      "loss_from_statistics(Tensor statistics, Tensor? temperature_tensor, float temperature, float beta, "
      "str summation, str denominator, float debias, bool detach_weights, str reduction) -> "
      "(Tensor loss, Tensor num_terms, Tensor derivatives)");
  m.def(
      "statistics_backward(Tensor derivatives, Tensor statistics, Tensor z, Tensor? key_z, Tensor? labels, "
      "Tensor? key_labels, Tensor? temperature_tensor, float temperature, SymInt dim, int? key_offset, float "
      "beta, "
      "bool normalized, int ignore_index, bool need_anchors, bool need_keys) -> (Tensor dz, Tensor dkeys)");
  m.def("temperature_gradient(Tensor dots, Tensor by_scale, bool symmetric, Tensor temperature) -> Tensor");
}

// The same functions serve both devices: backend_for() looks at the tensors.
#define CLCE_IMPLEMENT(key)                                         \
  TORCH_LIBRARY_IMPL(clce_ext, key, m) {                            \
    m.impl("contrastive_loss", contrastive_loss);                   \
    m.impl("contrastive_loss_backward", contrastive_loss_backward); \
    m.impl("check_arguments", check_arguments);                     \
    m.impl("prepare", prepare_op);                                  \
    m.impl("prepare_backward", prepare_backward_op);                \
    m.impl("statistics", statistics_op);                            \
    m.impl("loss_from_statistics", loss_from_statistics);           \
    m.impl("statistics_backward", statistics_backward);             \
  }
CLCE_IMPLEMENT(CPU)
CLCE_IMPLEMENT(CUDA)
// Made of torch's own operations: any device.
TORCH_LIBRARY_IMPL(clce_ext, CompositeExplicitAutograd, m) {
  m.impl("temperature_gradient", temperature_gradient);
}

}  // namespace clce::binding
