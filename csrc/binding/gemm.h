// A product of row-major matrices as a library of column-major ones takes it.
#pragma once

#include "backend.h"

namespace clce::binding {

// What is called gemm: c = a b, [m, n] = [m, k] [k, n], each operand transposed or not, columns `ld` apart.
struct Gemm {
  struct Operand {
    const void* data;
    int ld;
    bool transposed;
  } a, b;
  int m, n, k;
  int c_ld;
};

// Rows that lie one after another are the columns of the transpose: cᵀ = bᵀ aᵀ.
inline Gemm column_major(const MatrixProduct& p) {
  const auto operand = [](const MatrixProduct::Operand& x) {
    return Gemm::Operand{x.data, int(x.stride), x.transposed};
  };
  return {operand(p.b), operand(p.a), int(p.columns), int(p.rows), int(p.inner), int(p.c_stride)};
}

}  // namespace clce::binding
