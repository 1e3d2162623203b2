#include "binding/product.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/cuda/CUDAFunctions.h>

namespace clce::binding {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return at::kDouble;
    case DType::kBFloat16:
      return at::kBFloat16;
    case DType::kFloat16:
      return at::kHalf;
    case DType::kFloat32:
      break;
  }
  return at::kFloat;
}

// Memory of the current device as a tensor.
at::Tensor matrix(const MatrixProduct::Operand& memory, int64_t rows, int64_t columns, at::ScalarType type) {
  const at::Device device(at::kCUDA, c10::cuda::current_device());
  const int64_t row = memory.transposed ? 1 : memory.stride, column = memory.transposed ? memory.stride : 1;
  return at::for_blob(const_cast<void*>(memory.data), {rows, columns})
      .strides({row, column})
      .options(at::TensorOptions(device).dtype(type))
      .target_device(device)
      .make_tensor();
}

void multiply(void*, const MatrixProduct& p, void*) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const at::ScalarType type = scalar_type(p.dtype);
  const at::ScalarType acc = p.dtype == DType::kFloat64 ? at::kDouble : at::kFloat;
  const at::Tensor a = matrix(p.a, p.rows, p.inner, type);
  const at::Tensor b = matrix(p.b, p.inner, p.columns, type);
  at::Tensor c = matrix({p.c, p.c_stride, false}, p.rows, p.columns, acc);
  if (type != acc) {  // 16-bit operands, and a float32 result that is never rounded to less
    p.accumulate ? at::addmm_out(c, c, a, b, acc) : at::mm_out(c, a, b, acc);
  } else {
    p.accumulate ? at::addmm_out(c, c, a, b) : at::mm_out(c, a, b);
  }
}

}  // namespace

ProductFunction torch_product() {
  return {multiply, nullptr};
}

}  // namespace clce::binding
