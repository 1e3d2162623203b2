// Rows of a matrix in shared memory, and how they get there.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

// Rows are 16 bytes apart from a multiple of 64 bytes, so the same 16-byte column of eight consecutive
// rows lies in different banks: no swizzle is needed for ldmatrix or for row-wise vector loads.
template <class T, int kRows_, int kCols_>
struct SharedTile {
  using Element = T;
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kStride = kCols + 16 / int(sizeof(T));  // elements
  static constexpr int kBytes = kRows * kStride * int(sizeof(T));
  static_assert(kCols * sizeof(T) % 32 == 0, "a row is some 32-byte sectors");

  T* base;

  CLCE_DEVICE explicit SharedTile(void* memory) : base(static_cast<T*>(memory)) {}
  CLCE_DEVICE T* at(int row, int col) const { return base + row * kStride + col; }
};

// Prepared rows of embeddings in global memory: `stride` elements from one to the next, 16-byte aligned.
template <class T>
struct Rows {
  const T* data;
  int64_t count, stride;
};

// How many neighbouring threads share a row of `per_row` pieces: at most 32, and so that `rows` rows are some
// whole turns of all threads if that is possible.
constexpr int lanes_per_row(int per_row, int rows, int threads) {
  int best = 1;
  for (int lanes = 1; lanes <= 32 && lanes <= per_row; ++lanes) {
    if (per_row % lanes != 0 || threads % lanes != 0) continue;
    if (lanes <= 8 || rows % (threads / lanes) == 0) best = lanes;
  }
  return best;
}

CLCE_DEVICE int at_most(int64_t x, int limit) {
  return x < limit ? int(x) : limit;
}

// Starts copying rows [first_row, + Tile::kRows) and columns [first_col, + Tile::kCols); zeros beyond the
// rows' ends. The block's threads share the work: up to 32 neighbours read one row. The caller commits.
template <int kThreads, class Tile, class T>
CLCE_DEVICE void load_async(const Tile& tile, const Rows<T>& rows, int64_t first_row, int64_t first_col) {
  constexpr int kVector = 16 / int(sizeof(T));
  constexpr int kPerRow = Tile::kCols / kVector;
  constexpr int kLanes = lanes_per_row(kPerRow, Tile::kRows, kThreads);
  constexpr int kRowsAtOnce = kThreads / kLanes;
  const int lane = int(threadIdx.x) % kLanes, row_of_thread = int(threadIdx.x) / kLanes;
  // Beyond these, zeros; an address is not read then. 32 bits do within a tile.
  const int rows_left = at_most(rows.count - first_row, Tile::kRows);
  const int cols_left = at_most(rows.stride - first_col, Tile::kCols);
  const uint32_t stride = uint32_t(rows.stride);
  const T* const from = rows.data + (first_row * rows.stride + first_col);
#pragma unroll
  for (int i = 0; i < Tile::kRows; i += kRowsAtOnce) {
    const int row = i + row_of_thread;
    if (Tile::kRows % kRowsAtOnce != 0 && row >= Tile::kRows) break;
#pragma unroll
    for (int j = 0; j < kPerRow; j += kLanes) {
      const int col = (j + lane) * kVector;
      const bool valid = row < rows_left && col < cols_left;
      ptx::cp_async<16>(tile.at(row, col), from + (uint32_t(row) * stride + uint32_t(col)), valid);
    }
  }
}

}  // namespace clce::cuda
