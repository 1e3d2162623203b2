// The matrix products of a tile, row-major: one call of torch's own BLAS where setup.py found its symbols
// (CLCE_TORCH_BLAS), else at::mm_out or at::addmm_out. Each is the work of one thread.
#pragma once

#include <cstdint>

#if defined(CLCE_TORCH_BLAS)
extern "C" {
void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
            const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
            const float* beta, float* c, const int* ldc);
void dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
            const double* alpha, const double* a, const int* lda, const double* b, const int* ldb,
            const double* beta, double* c, const int* ldc);
}
#else
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#endif
#if defined(CLCE_TORCH_MKL)
extern "C" int MKL_Set_Num_Threads_Local(int threads);
#endif

namespace clce::cpu {

// While it lives, MKL computes the calling thread's products alone. Otherwise it shares small products among
// all of torch's threads, though tasks of ours keep those busy, and cuts the inner dimension for it: another
// order of additions for each number of threads.
class OneThread {
 public:
#if defined(CLCE_TORCH_MKL)
  OneThread() : before_(MKL_Set_Num_Threads_Local(1)) {}
  ~OneThread() { MKL_Set_Num_Threads_Local(before_); }

 private:
  int before_;
#else
  OneThread() {}
#endif
};

enum class Transpose : char { kNo = 'N', kYes = 'T' };

// c [m, n] (+)= op(a) [m, k] op(b) [k, n]; strides are of the matrices as stored, in elements.
template <class T>
void gemm(Transpose ta, Transpose tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
          int64_t ldb, bool accumulate, T* c, int64_t ldc) {
  const OneThread one_thread;
#if defined(CLCE_TORCH_BLAS)
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
#else
  // Worker threads do not inherit the caller's dispatch state: below autograd and autocast.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const auto view = [&](const T* data, Transpose t, int64_t rows, int64_t cols, int64_t ld) {
    return t == Transpose::kNo ? at::from_blob(const_cast<T*>(data), {rows, cols}, {ld, 1}, options)
                               : at::from_blob(const_cast<T*>(data), {rows, cols}, {1, ld}, options);
  };
  at::Tensor out = at::from_blob(c, {m, n}, {ldc, 1}, options);
  const at::Tensor left = view(a, ta, m, k, lda), right = view(b, tb, k, n, ldb);
  accumulate ? at::addmm_out(out, out, left, right) : at::mm_out(out, left, right);
#endif
}

}  // namespace clce::cpu
