#include "binding/product.h"

#include <library_types.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

#include "binding/gemm.h"

// Of cuBLAS's C interface what is called here, as <cublas_v2.h> has it since CUDA 11: a toolkit without that
// header is enough to build.
extern "C" int cublasGemmEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                            const void* alpha, const void* a, cudaDataType a_type, int a_ld, const void* b,
                            cudaDataType b_type, int b_ld, const void* beta, void* c, cudaDataType c_type,
                            int c_ld, int compute_type, int algorithm);

// libtorch_cuda and the cuBLAS that it brings have them, of which a torch for CPUs alone has none.
#pragma weak torch_get_current_cuda_blas_handle
#pragma weak cublasGemmEx

namespace clce::binding {
namespace {

cudaDataType element_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return CUDA_R_64F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    case DType::kFloat16:
      return CUDA_R_16F;
    case DType::kFloat32:
      break;
  }
  return CUDA_R_32F;
}

// cublasComputeType_t, cublasGemmAlgo_t, cublasStatus_t. cublasOperation_t is 0, or 1 for the transpose.
constexpr int kCompute32 = 68, kComputeTf32 = 77, kCompute64 = 70;
constexpr int kDefaultAlgorithm = -1;
constexpr int kSuccess = 0;

int compute_type(const MatrixProduct& p) {
  if (p.dtype == DType::kFloat64) return kCompute64;
  return p.dtype == DType::kFloat32 && p.allow_tf32 ? kComputeTf32 : kCompute32;
}

// With factors of the type that is computed in.
template <class T>
int multiply_as(void* handle, const MatrixProduct& p, cudaDataType acc) {
  const T one = 1, kept = p.accumulate ? 1 : 0;
  const cudaDataType type = element_type(p.dtype);
  const Gemm g = column_major(p);
  return cublasGemmEx(handle, g.a.transposed, g.b.transposed, g.m, g.n, g.k, &one, g.a.data, type, g.a.ld,
                      g.b.data, type, g.b.ld, &kept, p.c, acc, g.c_ld, compute_type(p), kDefaultAlgorithm);
}

void multiply(void*, const MatrixProduct& p, void*) {
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  const int status = p.dtype == DType::kFloat64 ? multiply_as<double>(handle, p, CUDA_R_64F)
                                                : multiply_as<float>(handle, p, CUDA_R_32F);
  if (status != kSuccess) {
    throw std::runtime_error("clce_ext: cuBLAS could not multiply matrices: status " +
                             std::to_string(status));
  }
}

}  // namespace

ProductFunction torch_product() {
  const bool found = torch_get_current_cuda_blas_handle != nullptr && cublasGemmEx != nullptr;
  return {found ? multiply : nullptr, nullptr};
}

}  // namespace clce::binding
