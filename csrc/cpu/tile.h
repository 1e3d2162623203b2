// What happens inside one tile of logits on the CPU: vector code, compiled once per instruction set
// (tile_default.cpp, tile_avx2.cpp, tile_avx512.cpp) and chosen at run time.
//
// Rows and columns come ordered by class, so a row's positives are one range of columns and no label is
// compared here: a row is negatives | positives | negatives, with the anchor itself cut out.
#pragma once

#include <cstdint>

namespace clce::cpu {

// Columns of one tile row, relative to the tile: [0, pos_begin) and [pos_end, n) are negatives,
// [pos_begin, pos_end) positives; `self`, where inside the tile, is neither.
struct RowRange {
  int64_t pos_begin, pos_end;
  int64_t self;  // -1: not in this tile
};

// A tile of dot products [rows, cols] with row stride ld, and how to read it as logits.
template <class T>
struct Tile {
  T* dots;
  int64_t rows, cols, ld;
  const RowRange* ranges;  // [rows]
  T scale;                 // 1 / temperature
  T beta;
};

// Bounded logits: sums of plain exponentials over the tile, one array element per row (or column).
template <class T>
struct BoundedSums {
  T* sum_pos;
  T* exp_pos;
  T* exp_w;
  T* exp_wn;
};

// Unbounded logits: sums relative to the maxima of positives and of negatives, combined with what the arrays
// already hold (maxima -inf and sums 0 at the start).
template <class T>
struct UnboundedSums {
  T* sum_pos;
  T* max_pos;
  T* exp_pos;
  T* max_neg;
  T* exp_w;
  T* exp_wn;
};

// From dot products to gradients of logits, one array element per row (or column):
//
//               positive                        negative
//   bounded     sum_pos + pos e^s               w e^(beta s) + wn e^((1 + beta) s)
//   unbounded   sum_pos + pos e^(s - lse_pos)   w e^(beta s - lse_w) + wn e^((1 + beta) s - lse_wn)
//
// In symmetric tiles the column's coefficients give as much again. Bounded logits do not read the logarithms,
// which are in their coefficients; the logarithms of unbounded ones come in two parts (see Statistics).
template <class T>
struct Coefficients {
  const T* sum_pos;
  const T* pos;
  const T* w;
  const T* wn;
  const T* lse_pos;
  const T* lse_w;
  const T* lse_wn;
  const T* lse_pos_low;
  const T* lse_w_low;
  const T* lse_wn_low;
};

template <class T>
struct TileKernels {
  const char* capability;
  // rows_out is written; cols_out (symmetric tiles; may be null) is added to.
  void (*forward_bounded)(const Tile<T>&, const BoundedSums<T>& rows_out, const BoundedSums<T>* cols_out);
  void (*forward_unbounded)(const Tile<T>&, const UnboundedSums<T>& rows_inout);
  // Turns dot products into gradients in place; cols is null unless the tile is symmetric.
  void (*backward_bounded)(const Tile<T>&, const Coefficients<T>& rows, const Coefficients<T>* cols);
  void (*backward_unbounded)(const Tile<T>&, const Coefficients<T>& rows, const Coefficients<T>* cols);
  void (*transpose)(const T* in, int64_t rows, int64_t cols, int64_t ld_in, T* out, int64_t ld_out);
};

// The kernels of the best instruction set that this processor and torch allow.
template <class T>
const TileKernels<T>& tile_kernels();

#define CLCE_DECLARE_TILE_KERNELS(capability) \
  namespace capability {                      \
  extern const TileKernels<float> kFloat;     \
  extern const TileKernels<double> kDouble;   \
  }
CLCE_DECLARE_TILE_KERNELS(baseline)
CLCE_DECLARE_TILE_KERNELS(avx2)
CLCE_DECLARE_TILE_KERNELS(avx512)
#undef CLCE_DECLARE_TILE_KERNELS

}  // namespace clce::cpu
