// Rows as the tiles want them: in the accumulation type, without ignored ones, ordered by class.
#pragma once

#include <cstdint>
#include <vector>

#include "backend.h"

namespace clce::cpu {

// One side of a contrast: which rows take part, in which order.
struct Order {
  std::vector<int64_t> source;  // row in the caller's tensor
  std::vector<int64_t> label;   // ascending
  int64_t size() const { return static_cast<int64_t>(source.size()); }
};

// Stable order by label of the rows whose label is not ignore_index; labels null: row / views.
Order order_by_label(const int64_t* labels, int64_t rows, int64_t views, int64_t ignore_index);

// For every anchor (in its order) the range of its class among the keys and its own place there, or -1.
struct Matches {
  std::vector<int64_t> pos_begin, pos_end, self;
};
Matches match(const Order& anchors, const Order& keys, const ContrastArgs& args);

// out [order.size(), stride] = rows of `in` (dtype), converted to T.
template <class T>
void gather_rows(const Order& order, DType dtype, const void* in, int64_t stride, T* out);

// out [rows, stride] = in at the rows of `order`, 0 elsewhere.
template <class T>
void scatter_rows(const Order& order, const T* in, int64_t rows, int64_t stride, T* out);

}  // namespace clce::cpu
