#include "binding/product.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "binding/tensors.h"

namespace clce::binding {
namespace {

// Memory of the current device as a tensor.
Tensor matrix(const MatrixProduct::Operand& memory, int64_t rows, int64_t columns, ScalarType type) {
  const std::array<int64_t, 2> sizes{rows, columns};
  const std::array<int64_t, 2> strides{memory.transposed ? 1 : memory.stride,
                                       memory.transposed ? memory.stride : 1};
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                     torch::stable::accelerator::getCurrentDeviceIndex());
  return torch::stable::from_blob(const_cast<void*>(memory.data), sizes, strides, device, type);
}

void multiply(void*, const MatrixProduct& p, void*) {
  namespace abi = torch::stable::detail;
  const Tensor c = matrix({p.c, p.c_stride, false}, p.rows, p.columns, acc_type(p.dtype));
  const Tensor a = matrix(p.a, p.rows, p.inner, scalar_type(p.dtype));
  const Tensor b = matrix(p.b, p.inner, p.columns, scalar_type(p.dtype));
  std::array<StableIValue, 4> stack{abi::from(c), abi::from(a), abi::from(b), abi::from(p.accumulate)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("clce_ext_backend::multiply", "", stack.data(), TORCH_ABI_VERSION));
}

}  // namespace

ProductFunction torch_product() {
  return {multiply, nullptr};
}

}  // namespace clce::binding
