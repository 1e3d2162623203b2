// Where torch begins: the kernels of torch.ops.clce_ext_backend.*, each made of calls of a backend (calls.h).
// Python has their schemas, checks their arguments (clce_ext/ops.py) and serves devices without kernels.
//
// torch hands an op's arguments over one by one, in the schema's order: each function below gathers them into
// structs with names at its beginning.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "binding/calls.h"

namespace clce::binding {
namespace {

using OptionalInt = std::optional<int64_t>;
using Text = const std::string&;

// ---- the whole loss ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_loss_op(
    const Tensor& embeddings, const OptionalTensor& labels, const OptionalTensor& keys,
    const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor, double temperature,
    int64_t views, OptionalInt key_offset, double beta, Text summation, Text denominator,
    const OptionalTensor& debias_tensor, double debias, bool detach_weights, bool normalize,
    int64_t ignore_index, Text reduction) {
  const BackendOnDevice backend = backend_for(embeddings);
  const DType dtype = dtype_of(embeddings);
  const ContrastOptions options{{temperature_tensor, temperature}, views, key_offset, beta, ignore_index};
  const LossOptions form =
      loss_options(dtype, beta, summation, denominator, {debias_tensor, debias}, detach_weights, reduction);

  PrepareArgs prepare_anchors, prepare_keys;
  const Rows anchors = rows_for(embeddings, normalize, prepare_anchors);
  const Rows key_rows = keys.has_value() ? rows_for(*keys, normalize, prepare_keys)
                                         : Rows{empty({0, anchors.z.size(1)}, scalar_type(dtype), embeddings),
                                                empty({0}, acc_type(dtype), embeddings)};
  const OptionalTensor key_z = keys.has_value() ? OptionalTensor(key_rows.z) : std::nullopt;
  const Contrast contrast(anchors.z, key_z, labels, key_labels, embeddings.size(1), normalize, options);
  const auto [statistics, loss] = forward(backend, contrast, anchors.z, form, prepare_anchors, prepare_keys);
  return {loss.value, loss.num_terms, statistics, loss.derivatives,
          anchors.z,  anchors.norms,  key_rows.z, key_rows.norms};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_loss_backward_op(
    const Tensor& grad_loss, const Tensor& num_terms, const Tensor& statistics, const Tensor& derivatives,
    const Tensor& z, const Tensor& norms, const OptionalTensor& key_z, const OptionalTensor& key_norms,
    const OptionalTensor& labels, const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
    double temperature, int64_t dim, int64_t views, OptionalInt key_offset, double beta, bool normalize,
    int64_t ignore_index, Text reduction, bool need_embeddings, bool need_keys, bool need_temperature) {
  const BackendOnDevice backend = backend_for(z);
  const ContrastOptions options{{temperature_tensor, temperature}, views, key_offset, beta, ignore_index};
  const Reduction kind = reduction_of(reduction);
  const Contrast contrast(z, key_z, labels, key_labels, dim, normalize, options);
  const Tensor upstream = contiguous_as(grad_loss, acc_type(contrast.args.dtype));

  BackwardArgs args;
  args.contrast = contrast.args;
  args.statistics = statistics.const_data_ptr();
  args.derivatives = derivatives.const_data_ptr();
  args.upstream = upstream.const_data_ptr();
  args.upstream_stride = kind == Reduction::kNone ? 1 : 0;
  args.num_terms = kind == Reduction::kMean ? num_terms.const_data_ptr() : nullptr;

  // The temperature's gradient is made of a row-wise dot of either side's gradient.
  const bool want_keys = need_keys && key_z.has_value();
  const bool keys_give_dots = need_temperature && !need_embeddings && want_keys;
  const bool anchors_give_dots = need_temperature && !keys_give_dots;
  const RowsBackward of_anchors =
      rows_backward_for({z, norms}, dim, normalize, need_embeddings, anchors_give_dots, args.project_anchors);
  const RowsBackward of_keys =
      want_keys ? rows_backward_for({*key_z, *key_norms}, dim, normalize,
                                    /*want_dx=*/true, keys_give_dots, args.project_keys)
                : RowsBackward{empty({0, dim}, scalar_type(args.contrast.dtype), z), of_anchors.dots};
  backward(backend, args, z, need_embeddings || anchors_give_dots, want_keys);
  const Tensor& dots = keys_give_dots ? of_keys.dots : of_anchors.dots;
  return {of_anchors.dx, of_keys.dx, need_temperature ? temperature_gradient(backend, args, dots) : dots};
}

// ---- its parts, for losses whose keys arrive in pieces ----

std::tuple<Tensor, Tensor> prepare_op(const Tensor& x, bool normalize) {
  const Rows rows = prepare(backend_for(x), x, normalize);
  return {rows.z, rows.norms};
}

Tensor prepare_backward_op(const Tensor& dz, const Tensor& z, const Tensor& norms, int64_t dim,
                           bool normalize) {
  const ScalarType acc = acc_type(dtype_of(z));
  return prepare_backward(backend_for(z), contiguous_as(dz, acc), {z, contiguous_as(norms, acc)}, dim,
                          normalize, /*want_dx=*/true, /*want_dots=*/false)
      .dx;
}

Tensor statistics_op(const Tensor& z, const OptionalTensor& key_z, const OptionalTensor& labels,
                     const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
                     double temperature, int64_t dim, OptionalInt key_offset, double beta, bool normalized,
                     int64_t ignore_index) {
  const BackendOnDevice backend = backend_for(z);
  const ContrastOptions options{
      {temperature_tensor, temperature}, /*views=*/1, key_offset, beta, ignore_index};
  const Contrast contrast(z, key_z, labels, key_labels, dim, normalized, options);
  return statistics_of(backend, contrast, z);
}

std::tuple<Tensor, Tensor, Tensor> loss_from_statistics_op(const Tensor& statistics,
                                                           const OptionalTensor& temperature_tensor,
                                                           double temperature, double beta, Text summation,
                                                           Text denominator,
                                                           const OptionalTensor& debias_tensor, double debias,
                                                           bool detach_weights, Text reduction) {
  const LossOptions options = loss_options(dtype_of(statistics), beta, summation, denominator,
                                           {debias_tensor, debias}, detach_weights, reduction);
  const Loss loss = loss_of(backend_for(statistics), statistics, {temperature_tensor, temperature}, options);
  return {loss.value, loss.num_terms, loss.derivatives};
}

std::tuple<Tensor, Tensor> statistics_backward_op(
    const Tensor& derivatives, const Tensor& statistics, const Tensor& z, const OptionalTensor& key_z,
    const OptionalTensor& labels, const OptionalTensor& key_labels, const OptionalTensor& temperature_tensor,
    double temperature, int64_t dim, OptionalInt key_offset, double beta, bool normalized,
    int64_t ignore_index, bool need_anchors, bool need_keys) {
  const BackendOnDevice backend = backend_for(z);
  const ContrastOptions options{
      {temperature_tensor, temperature}, /*views=*/1, key_offset, beta, ignore_index};
  const Contrast contrast(z, key_z, labels, key_labels, dim, normalized, options);
  const ScalarType acc = acc_type(contrast.args.dtype);
  const Tensor s = contiguous_as(statistics, acc), d = contiguous_as(derivatives, acc);
  BackwardArgs args;
  args.contrast = contrast.args;
  args.statistics = s.const_data_ptr();
  args.derivatives = d.const_data_ptr();
  const Gradients gradients = backward(backend, args, z, need_anchors, need_keys);
  return {gradients.danchors, gradients.dkeys};
}

// One function on every device with kernels, as backend_for() looks at the tensors.
void serve(torch::stable::detail::StableLibrary& library) {
  library.impl("contrastive_loss", TORCH_BOX(&contrastive_loss_op));
  library.impl("contrastive_loss_backward", TORCH_BOX(&contrastive_loss_backward_op));
  library.impl("prepare", TORCH_BOX(&prepare_op));
  library.impl("prepare_backward", TORCH_BOX(&prepare_backward_op));
  library.impl("statistics", TORCH_BOX(&statistics_op));
  library.impl("loss_from_statistics", TORCH_BOX(&loss_from_statistics_op));
  library.impl("statistics_backward", TORCH_BOX(&statistics_backward_op));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clce_ext_backend, CPU, library) {
  serve(library);
}
#if defined(CLCE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(clce_ext_backend, CUDA, library) {
  serve(library);
}
#endif

}  // namespace clce::binding
