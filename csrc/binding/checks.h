// From what callers pass to what backends take, and the checks of it. Every message names the argument, what
// came and what is accepted. What torch.ops does not see, such as the mixing weight, is checked in Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "backend.h"

namespace clce::binding {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tensor of one element, and where there is none, a number.
struct Temperature {
  OptionalTensor tensor;
  double number;
};

// The options that a contrast's statistics depend on, in the schemas' order.
struct ContrastOptions {
  Temperature temperature;
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

DType dtype_of(const Tensor& tensor, const char* name);
at::ScalarType acc_type(DType dtype);

LossOptions loss_options(double beta, std::string_view summation, std::string_view denominator, double debias,
                         bool detach_weights, std::string_view reduction);
// Of each anchor [M], on the device: in acc_type(dtype).
OptionalTensor debias_of_anchors(const OptionalTensor& debias, int64_t num_anchors, DType dtype,
                                 const at::Device& device);
Reduction reduction_of(std::string_view value);

// [M, D] anchors, labels, and where given [N, D] keys and their labels: ranks, lengths, dtypes, devices.
void check_contrast(const Tensor& anchors, const OptionalTensor& labels, const OptionalTensor& keys,
                    const OptionalTensor& key_labels, const ContrastOptions& options);

void check_temperature(const Temperature& temperature, const at::Device& device);

// What one op gives and another one takes: rows as prepared, and numbers that belong to them.
void check_prepared(const Tensor& z, const OptionalTensor& key_z, int64_t dim);
void check_rows_of(const Tensor& z, const Tensor& tensor, const char* name, at::IntArrayRef shape);

}  // namespace clce::binding
