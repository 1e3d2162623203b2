// One call of each of a backend's functions: tensors in, new tensors out.
#pragma once

#include <string_view>
#include <utility>

#include "binding/devices.h"
#include "binding/tensors.h"

namespace clce::binding {

// A tensor, and where there is none, a number. The temperature's has one element, that of debias one for each
// anchor.
struct TensorOrNumber {
  OptionalTensor tensor;
  double number;
};

// The options that a contrast's statistics depend on, in the schemas' order.
struct ContrastOptions {
  TensorOrNumber temperature;
  int64_t views;
  std::optional<int64_t> key_offset;
  double beta;
  int64_t ignore_index;
};

// What makes a loss of the statistics.
struct LossOptions {
  LossConfig config;
  Reduction reduction;
  OptionalTensor debias;  // acc [M]: of each anchor, instead of the config's
};
LossOptions loss_options(DType dtype, double beta, std::string_view summation, std::string_view denominator,
                         const TensorOrNumber& debias, bool detach_weights, std::string_view reduction);
Reduction reduction_of(std::string_view name);

// Rows from `prepare`, with the embeddings' norms: none where they are not normalised.
struct Rows {
  Tensor z, norms;
};
// Allocates what prepare writes, and makes `args` those of the call.
Rows rows_for(const Tensor& x, bool normalize, PrepareArgs& args);
Rows prepare(const BackendOnDevice& backend, const Tensor& x, bool normalize);

// The gradient of the embeddings, and z . dz per row; what is not wanted has no rows.
struct RowsBackward {
  Tensor dx, dots;
};
// The same as rows_for, for prepare_backward; `args` has no dz yet.
RowsBackward rows_backward_for(const Rows& rows, int64_t dim, bool normalize, bool want_dx, bool want_dots,
                               PrepareBackwardArgs& args);
RowsBackward prepare_backward(const BackendOnDevice& backend, const Tensor& dz, const Rows& rows, int64_t dim,
                              bool normalize, bool want_dx, bool want_dots);

// Anchors against keys as backends read them. Holds the labels and the temperature that `args` points to; the
// rows must outlive it.
struct Contrast {
  // z [M, stride] against key_z, or against itself; `normalized` says that rows have length 1 at most.
  Contrast(const Tensor& z, const OptionalTensor& key_z, const OptionalTensor& labels,
           const OptionalTensor& key_labels, int64_t dim, bool normalized, const ContrastOptions& options);
  OptionalTensor labels, key_labels, temperature;
  ContrastArgs args;
};

// value [] or [M], num_terms [], derivatives [5, M]
struct Loss {
  Tensor value, num_terms, derivatives;
};

Tensor statistics_of(const BackendOnDevice& backend, const Contrast& contrast, const Tensor& z);
// The same with the loss and what prepares the rows, in one call.
std::pair<Tensor, Loss> forward(const BackendOnDevice& backend, const Contrast& contrast, const Tensor& z,
                                const LossOptions& options, const PrepareArgs& anchors,
                                const PrepareArgs& keys);
Loss loss_of(const BackendOnDevice& backend, const Tensor& statistics, const TensorOrNumber& temperature,
             const LossOptions& options);

// danchors [M, stride], dkeys [N, stride] in the accumulation type; what is not wanted has no rows. In
// self-contrast danchors holds both sides' gradient, dkeys nothing.
struct Gradients {
  Tensor danchors, dkeys;
};
Gradients backward(const BackendOnDevice& backend, BackwardArgs args, const Tensor& z, bool want_anchors,
                   bool want_keys);

// [], the gradient by the temperature; `args` as backward got them, `dots` of all rows of one side.
Tensor temperature_gradient(const BackendOnDevice& backend, const BackwardArgs& args, const Tensor& dots);

}  // namespace clce::binding
