// The walk over panels of logits, and the products that begin and end each of them.
//
// Panels are taken in a fixed order, and both passes ask for the same products of logits: the same bits.
#pragma once

#include <algorithm>

#include "backend.h"
#include "cuda/panels/panel.h"
#include "cuda/plan/plan.h"
#include "dispatch.h"

namespace clce::cuda {

// Calls use(Panel). In self-contrast the panels hold every pair with column > row, and as little else as
// whole rows and columns allow.
template <class Use>
void for_each_panel(const ContrastArgs& args, const PanelShape& shape, Use use) {
  for (int64_t row = 0; row < args.num_anchors; row += shape.rows) {
    const int64_t first = args.symmetric ? row / shape.columns * shape.columns : 0;
    for (int64_t column = first; column < args.num_keys; column += shape.columns) {
      Panel panel{row, std::min(shape.rows, args.num_anchors - row), column,
                  std::min(shape.columns, args.num_keys - column)};
      if (args.symmetric) panel.rows = std::min(panel.rows, column + panel.columns - 1 - row);
      if (panel.rows > 0) use(panel);
    }
  }
}

// Rows of prepared embeddings, from `first` on.
inline MatrixProduct::Operand rows_from(const ContrastArgs& args, const void* rows, int64_t first) {
  return {static_cast<const char*>(rows) + first * args.stride * element_bytes(args.dtype), args.stride,
          false};
}

inline void multiply(const ContrastArgs& args, MatrixProduct product, void* stream) {
  product.dtype = args.dtype;
  product.allow_tf32 = args.allow_tf32;
  args.product.multiply(args.product.context, product, stream);
}

// dots [rows, columns], `stride` apart: the panel's anchors times its keys.
inline void multiply_logits(const ContrastArgs& args, const Panel& panel, void* dots, int64_t stride,
                            void* stream) {
  MatrixProduct product;
  product.rows = panel.rows;
  product.columns = panel.columns;
  product.inner = args.stride;  // padding is 0, and with it rows are whole vectors
  product.a = rows_from(args, args.anchors, panel.row);
  product.b = rows_from(args, args.keys, panel.column);
  product.b.transposed = true;
  product.c = dots;
  product.c_stride = stride;
  multiply(args, product, stream);
}

// dL/ds times embeddings, of rows [first, first + rows) of a gradient. Padding is left alone, as 0 times an
// infinite dL/ds would not be 0.
inline void multiply_gradient(const ContrastArgs& args, const MatrixProduct::Operand& gradients, int64_t rows,
                              const MatrixProduct::Operand& embeddings, int64_t inner, void* total,
                              int64_t first, bool accumulate, void* stream) {
  if (!total) return;
  MatrixProduct product;
  product.rows = rows;
  product.columns = args.dim;
  product.inner = inner;
  product.a = gradients;
  product.b = embeddings;
  product.c = static_cast<char*>(total) + first * args.stride * acc_bytes(args.dtype);
  product.c_stride = args.stride;
  product.accumulate = accumulate;
  multiply(args, product, stream);
}

}  // namespace clce::cuda
