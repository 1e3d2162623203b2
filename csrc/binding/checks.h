// The one place that looks at what callers pass. Every message names the argument, what came and what
// is accepted.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "backend.h"

namespace clce::binding {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The options of a contrast that its statistics depend on.
struct ContrastOptions {
  OptionalTensor temperature_tensor;
  double temperature;
  int64_t views;
  std::optional<int64_t> key_offset;
  double beta;
  int64_t ignore_index;
};

DType dtype_of(const Tensor& tensor, const char* name);
at::ScalarType acc_type(DType dtype);

Reduction reduction_of(const std::string& value);
LossConfig loss_config(double beta, const std::string& summation, const std::string& denominator,
                       double debias, bool detach_weights);

// [M, D] anchors, labels, and where given [N, D] keys and their labels: ranks, lengths, dtypes, devices.
void check_contrast(const Tensor& anchors, const OptionalTensor& labels, const OptionalTensor& keys,
                    const OptionalTensor& key_labels, const ContrastOptions& options);

void check_temperature(const OptionalTensor& tensor, double value, const at::Device& device);

// Of what the ops in parts hand on: embeddings as prepared, and numbers that belong to their rows.
void check_prepared(const Tensor& z, const OptionalTensor& key_z, int64_t dim);
void check_rows_of(const Tensor& z, const Tensor& tensor, const char* name, at::IntArrayRef shape);

}  // namespace clce::binding
