// From a dtype known at run time to a C++ type known at compile time.
#pragma once

#include <type_traits>

#include "backend.h"

namespace clce {

// The accumulation type of T: what sums, statistics and gradients of rows of T are kept in.
template <class T>
using AccumulationType = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Bytes of an element, and of the type that it is accumulated in.
constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
constexpr int64_t acc_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

// Calls use(T()) with the type of the elements, for use to take decltype of. A backend brings its own types
// of 16 bits.
template <class BFloat16, class Float16, class Use>
void with_element_type(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kFloat32:
      return use(float());
    case DType::kFloat64:
      return use(double());
    case DType::kBFloat16:
      return use(BFloat16());
    case DType::kFloat16:
      return use(Float16());
  }
}

// The same with the accumulation type.
template <class Use>
void with_accumulation_type(DType dtype, const Use& use) {
  dtype == DType::kFloat64 ? use(double()) : use(float());
}

}  // namespace clce
