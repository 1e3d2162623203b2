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

// Prepared rows of embeddings in global memory, less than 2^32: `stride` elements from one to the next,
// 16-byte aligned.
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

// The rows of one tile: `most` from `row` on, or as many as there are.
template <class T>
struct TileRows {
  const unsigned char* data;
  int count;

  CLCE_DEVICE TileRows(const Rows<T>& rows, uint32_t row, uint32_t most)
      : data(reinterpret_cast<const unsigned char*>(rows.data) +
             uint64_t(row) * (uint32_t(rows.stride) * uint32_t(sizeof(T)))) {
    const uint32_t all = uint32_t(rows.count), left = row < all ? all - row : 0;
    count = int(left < most ? left : most);
  }
};

// A thread's share in copying tiles from rows that are `stride` elements apart, made once for all of them.
// The block's threads share a tile: up to 32 neighbours read one row.
template <int kThreads, class Tile>
class TileCopies {
 public:
  using T = typename Tile::Element;

  CLCE_DEVICE explicit TileCopies(int64_t stride, uint32_t thread = threadIdx.x)
      : stride_(uint32_t(stride) * uint32_t(sizeof(T))),
        row_(int(thread / kLanes)),
        col_(int(thread % kLanes) * 16),
        to_(uint32_t(row_) * uint32_t(Tile::kStride * sizeof(T)) + uint32_t(col_)),
        from_(uint32_t(row_) * stride_ + uint32_t(col_)) {}

  // Starts copying columns [first_col, + Tile::kCols) of the rows; zeros beyond the ends, where nothing is
  // read. The caller commits.
  CLCE_DEVICE void start(const Tile& to, const TileRows<T>& rows, int first_col) const {
    const int rows_left = rows.count - row_;
    const uint32_t first = uint32_t(first_col) * uint32_t(sizeof(T));
    const int bytes_left = int(stride_ - first) - col_;
    const unsigned char* from = rows.data + (from_ + first);  // 32 bits do within a tile
    auto* const place = reinterpret_cast<unsigned char*>(to.base) + to_;
#pragma unroll
    for (int i = 0; i < Tile::kRows; i += kRowsAtOnce) {
      if (Tile::kRows % kRowsAtOnce != 0 && i + row_ >= Tile::kRows) break;
#pragma unroll
      for (int j = 0; j < kPerRow; j += kLanes) {
        ptx::cp_async<16>(place + (i * Tile::kStride + j * kVector) * int(sizeof(T)), from + 16 * j,
                          i < rows_left && 16 * j < bytes_left);
      }
      from += stride_ * uint32_t(kRowsAtOnce);
    }
  }

  // What such a copy is, for all threads of the block to say.
  CLCE_DEVICE void count(const TileRows<T>& rows, int first_col) const {
    ptx::count_copy(rows.count < Tile::kRows, int(stride_) < (first_col + Tile::kCols) * int(sizeof(T)));
  }

 private:
  static constexpr int kVector = 16 / int(sizeof(T));
  static constexpr int kPerRow = Tile::kCols / kVector;
  static constexpr int kLanes = lanes_per_row(kPerRow, Tile::kRows, kThreads);
  static constexpr int kRowsAtOnce = kThreads / kLanes;

  const uint32_t stride_;  // bytes
  const int row_, col_;    // in a tile, of the thread's first piece: row, byte of it
  // That piece, in bytes from the tile's base and from the rows' first element.
  const uint32_t to_, from_;
};

// The same for one tile: nothing is kept in registers for another one.
template <int kThreads, class Tile, class T>
CLCE_DEVICE void load_async(const Tile& tile, const Rows<T>& rows, int64_t first_row, int64_t first_col) {
  const TileCopies<kThreads, Tile> copies(rows.stride, ptx::opaque(threadIdx.x));
  const TileRows<T> rows_of_tile(rows, uint32_t(first_row), Tile::kRows);
  copies.count(rows_of_tile, int(first_col));
  copies.start(tile, rows_of_tile, int(first_col));
}

}  // namespace clce::cuda
