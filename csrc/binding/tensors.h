// Tensors as torch's stable C++ ABI has them, and what of them backends take.
//
// What is compiled here runs with every torch from 2.10 on: nothing but torch/csrc/stable and
// torch/headeronly may be included.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "backend.h"

namespace clce::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& tensor);
ScalarType scalar_type(DType dtype);
ScalarType acc_type(DType dtype);

// Uninitialised and contiguous, on the device of `like`.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like);

// The tensor itself where it is of this type, contiguous and at a multiple of 16 bytes, of which CUDA kernels
// read as many at a time; else a copy, which is.
Tensor contiguous_as(const Tensor& tensor, ScalarType type);

}  // namespace clce::binding
