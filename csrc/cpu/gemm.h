// The matrix products of a tile, row-major: one call of the BLAS that torch brings along, where libtorch_cpu
// exports it (with MKL it does), else aten::mm. Each is the work of one thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>

#include "cpu/memory.h"

// Null where no library has them.
extern "C" {
[[gnu::weak]] void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                          const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                          const float* beta, float* c, const int* ldc);
[[gnu::weak]] void dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                          const double* alpha, const double* a, const int* lda, const double* b,
                          const int* ldb, const double* beta, double* c, const int* ldc);
[[gnu::weak]] int MKL_Set_Num_Threads_Local(int threads);
}

namespace clce::cpu {

inline bool has_blas() {
  return sgemm_ != nullptr && dgemm_ != nullptr;
}

// While it lives, MKL computes the calling thread's products alone. Otherwise it shares small products among
// all of torch's threads, though tasks of ours keep those busy, and cuts the inner dimension for it: another
// order of additions for each number of threads.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local != nullptr ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }

 private:
  int before_;
};

enum class Transpose : char { kNo = 'N', kYes = 'T' };

// A matrix in memory; `stride` elements from row to row of it as stored.
template <class T>
torch::stable::Tensor view(const T* data, Transpose transpose, int64_t rows, int64_t cols, int64_t stride) {
  using torch::headeronly::ScalarType;
  const std::array<int64_t, 2> sizes{rows, cols};
  const std::array<int64_t, 2> strides{transpose == Transpose::kNo ? stride : 1,
                                       transpose == Transpose::kNo ? 1 : stride};
  return torch::stable::from_blob(const_cast<T*>(data), sizes, strides, torch::headeronly::DeviceType::CPU,
                                  sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::Double);
}

// out = a b
inline void mm_out(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                   const torch::stable::Tensor& b) {
  namespace abi = torch::stable::detail;
  std::array<StableIValue, 3> stack{abi::from(a), abi::from(b), abi::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  abi::to<torch::stable::Tensor>(stack[0]);  // releases it
}

// c [m, n] (+)= op(a) [m, k] op(b) [k, n]; strides are of the matrices as stored, in elements.
template <class T>
void gemm(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
          int64_t ldb, bool accumulate, T* c, int64_t ldc) {
  const OneThread one_thread;
  if (has_blas()) {
    // BLAS is column-major: c^T = op(b)^T op(a)^T.
    const char first = static_cast<char>(tb), second = static_cast<char>(ta);
    const int im = static_cast<int>(m), in = static_cast<int>(n), ik = static_cast<int>(k);
    const int ia = static_cast<int>(lda), ib = static_cast<int>(ldb), ic = static_cast<int>(ldc);
    const T one = 1, beta = accumulate ? 1 : 0;
    if constexpr (sizeof(T) == sizeof(float)) {
      sgemm_(&first, &second, &in, &im, &ik, &one, b, &ib, a, &ia, &beta, c, &ic);
    } else {
      dgemm_(&first, &second, &in, &im, &ik, &one, b, &ib, a, &ia, &beta, c, &ic);
    }
    return;
  }
  const auto left = view(a, ta, m, k, lda), right = view(b, tb, k, n, ldb);
  if (!accumulate) return mm_out(view(c, Transpose::kNo, m, n, ldc), left, right);
  // aten::addmm takes two numbers of any type, which cannot be handed over.
  const Buffer<T> product(m * n);
  mm_out(view(product.get(), Transpose::kNo, m, n, n), left, right);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += product.get()[i * n + j];
}

}  // namespace clce::cpu
