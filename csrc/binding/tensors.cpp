#include "binding/tensors.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <stdexcept>

namespace clce::binding {

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      throw std::invalid_argument("clce_ext has no kernels for tensors of this dtype");
  }
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kFloat32:
      break;
  }
  return ScalarType::Float;
}

ScalarType acc_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  // torch::stable::empty asks torch's dispatcher, which costs a small batch's call a tenth of its time.
  std::array<int64_t, 2> strides{1, 1};
  if (sizes.size() == 2) strides[0] = *(sizes.begin() + 1) > 0 ? *(sizes.begin() + 1) : 1;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  namespace abi = torch::stable::detail;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), abi::to<int32_t>(abi::from(type)),
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor contiguous_as(const Tensor& tensor, ScalarType type) {
  const Tensor typed = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  if (!typed.is_contiguous()) return torch::stable::contiguous(typed);
  constexpr uintptr_t kPackBytes = 16;
  const bool aligned = reinterpret_cast<uintptr_t>(typed.const_data_ptr()) % kPackBytes == 0;
  return aligned ? typed : torch::stable::clone(typed);
}

}  // namespace clce::binding
