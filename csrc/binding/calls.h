// One call of each of a backend's functions: tensors in, new tensors out.
#pragma once

#include <utility>

#include "binding/checks.h"
#include "binding/devices.h"

namespace clce::binding {

// Rows from `prepare`, with the embeddings' norms: none where they are not normalised.
struct Rows {
  Tensor z, norms;
};
Rows prepare(const BackendOnStream& backend, const Tensor& x, bool normalize, const char* name);

// The gradient of the embeddings, and z . dz per row; what is not wanted has no rows.
struct RowsBackward {
  Tensor dx, dots;
};
RowsBackward prepare_backward(const BackendOnStream& backend, const Tensor& dz, const Rows& rows, int64_t dim,
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

Tensor statistics_of(const BackendOnStream& backend, const Contrast& contrast, const Tensor& z);
// The same with the loss, in one call.
std::pair<Tensor, Loss> forward(const BackendOnStream& backend, const Contrast& contrast, const Tensor& z,
                                const LossOptions& options);
Loss loss_of(const BackendOnStream& backend, const Tensor& statistics, const Temperature& temperature,
             const LossOptions& options);

// danchors [M, stride], dkeys [N, stride] in the accumulation type; what is not wanted has no rows. In
// self-contrast danchors holds both sides' gradient, dkeys nothing.
struct Gradients {
  Tensor danchors, dkeys;
};
Gradients backward(const BackendOnStream& backend, BackwardArgs args, const Tensor& z, bool want_anchors,
                   bool want_keys);

}  // namespace clce::binding
