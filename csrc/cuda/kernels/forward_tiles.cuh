// The tiles that a block of the forward pass walks over, and their way into shared memory.
#pragma once

#include "cuda/grid.h"
#include "cuda/kernels/labels.cuh"
#include "cuda/kernels/logits.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace clce::cuda {

template <class Element, class T>
struct ForwardParams {
  Rows<Element> anchors, keys;
  Labels anchor_labels, key_labels;
  Scale<T> scale;
  T beta;
  bool symmetric, has_self;
  int64_t self_offset;
  int groups;        // symmetric: G; else the number of column splits
  T* slots;          // [groups][fields][M]
  uint32_t* ticket;  // set to 0 for the merge that follows
};

// A block's tiles, by their places in the grid of all tiles: a rectangle, of which a triangular one has only
// tiles with col >= row. It is walked in bands of kBand columns of tiles, in a band row by row.
template <int kBand>
struct TileRectangle {
  int row_begin, row_end, col_begin, col_end;
  bool triangular;

  CLCE_DEVICE int band_end(int band) const { return band + kBand < col_end ? band + kBand : col_end; }
  // Of the rows that have tiles in the band that begins at column `band`.
  CLCE_DEVICE int rows_end(int band) const {
    return triangular && band_end(band) < row_end ? band_end(band) : row_end;
  }
  CLCE_DEVICE int first_col(int row, int band) const { return triangular && row > band ? row : band; }
  // How many tiles of a column count for it.
  CLCE_DEVICE int rows_above(int col) const { return (triangular ? col : row_end) - row_begin; }
};

template <int kBand>
struct TilePlace {
  int band, row, col;

  CLCE_DEVICE explicit TilePlace(const TileRectangle<kBand>& all)
      : band(all.col_begin), row(all.row_begin), col(all.col_begin) {}

  CLCE_DEVICE bool is_within(const TileRectangle<kBand>& all) const { return band < all.col_end; }
  // In its band: is it the first of its row, the last of its row, the last of all?
  CLCE_DEVICE bool begins_row(const TileRectangle<kBand>& all) const {
    return col == all.first_col(row, band);
  }
  CLCE_DEVICE bool ends_row(const TileRectangle<kBand>& all) const { return col + 1 == all.band_end(band); }
  CLCE_DEVICE bool ends_band(const TileRectangle<kBand>& all) const {
    return ends_row(all) && row + 1 == all.rows_end(band);
  }

  CLCE_DEVICE void next(const TileRectangle<kBand>& all) {
    if (!ends_row(all)) {
      ++col;
      return;
    }
    if (++row == all.rows_end(band)) {
      band = all.band_end(band);
      row = all.row_begin;
    }
    col = all.first_col(row, band);
  }
};

// The slots of the block's rows and columns are named by its groups of columns and rows.
struct BlockSlots {
  int row, col;
};

// The block's tiles.
template <class Traits>
CLCE_DEVICE TileRectangle<Traits::kBand> block_tiles(const typename Traits::Params& p, BlockSlots& slots) {
  const uint32_t row_tiles = uint32_t(ceil_div(p.anchors.count, Traits::F::kM)),
                 col_tiles = uint32_t(ceil_div(p.keys.count, Traits::F::kN));
  TileRectangle<Traits::kBand> all;
  int first = 0, second = int(blockIdx.y);
  if (p.symmetric) {
    int rest = int(blockIdx.x);
    for (; rest >= p.groups - first; ++first) rest -= p.groups - first;
    second = first + rest;
    all.row_begin = part_begin(row_tiles, p.groups, first);
    all.row_end = part_begin(row_tiles, p.groups, first + 1);
  } else {
    all.row_begin = int(blockIdx.x);
    all.row_end = all.row_begin + 1;
  }
  all.col_begin = part_begin(col_tiles, p.groups, second);
  all.col_end = part_begin(col_tiles, p.groups, second + 1);
  all.triangular = p.symmetric && first == second;
  slots = {second, first};
  return all;
}

// The steps of a block's tiles, for the pipeline. The halves of the block load by turns: what a thread has to
// find out for a step is for twice as many copies then.
template <class Traits>
struct ForwardSteps {
  using TileA = typename Traits::TileA;
  using TileB = typename Traits::TileB;
  using RowsOfTile = TileRows<typename TileA::Element>;

  static constexpr int kLoaders = Traits::kThreads / 2;

  const typename Traits::Params& p;
  const TileRectangle<Traits::kBand>& all;
  uint32_t turn = 0;  // of which half
  // Of the next step.
  TilePlace<Traits::kBand> tile;
  int col = 0;
  int row_that_stays = -1;  // row of tiles whose embeddings need no other copy
  TileCopies<kLoaders, TileA> copies;

  CLCE_DEVICE ForwardSteps(const typename Traits::Params& p, const TileRectangle<Traits::kBand>& all)
      : p(p), all(all), tile(all), copies(p.anchors.stride, threadIdx.x % kLoaders) {}

  CLCE_DEVICE bool left() const { return tile.is_within(all); }
  CLCE_DEVICE RowsOfTile rows_of_tile() const {
    return {p.anchors, uint32_t(tile.row) * TileA::kRows, TileA::kRows};
  }
  CLCE_DEVICE RowsOfTile cols_of_tile() const {
    return {p.keys, uint32_t(tile.col) * TileB::kRows, TileB::kRows};
  }
  CLCE_DEVICE void load(unsigned char* to) {
    copies.count(rows_of_tile(), col);
    copies.count(cols_of_tile(), col);
    if (threadIdx.x / kLoaders == turn) {
      if (tile.row != row_that_stays) copies.start(TileA(to), rows_of_tile(), col);
      copies.start(TileB(to + TileA::kBytes), cols_of_tile(), col);
    }
    turn ^= 1;
    col += Traits::kDepth;
    if (col >= int(p.anchors.stride)) {
      // Where a tile's steps take all places, each comes to its own again, and finds the same rows there.
      if (col == Traits::Ring::kPlaces * Traits::kDepth) row_that_stays = tile.row;
      col = 0;
      tile.next(all);
    }
  }
};

}  // namespace clce::cuda
