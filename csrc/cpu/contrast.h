// Anchors against keys on the CPU, as forward and backward share it: both sides ordered by class, cut into
// blocks; the walk over the tiles (schedule.h), and each tile's dot products (gemm.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backend.h"
#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "cpu/rows.h"
#include "cpu/schedule.h"
#include "cpu/tile.h"

namespace clce::cpu {

// Rows of a tile: two blocks of embeddings and the tile itself should fit a core's L2; small batches are
// cut finer so that there is something to share among threads. Depends on the sizes alone.
inline int64_t block_size(int64_t rows) {
  if (rows >= 2048) return 256;
  if (rows >= 768) return 128;
  return std::max<int64_t>(16, (rows / 4 + 15) / 16 * 16);
}

// Of ContrastArgs or LossArgs with accumulation type T.
template <class T, class Args>
double temperature_of(const Args& args) {
  return args.temperature_ptr != nullptr ? *static_cast<const T*>(args.temperature_ptr) : args.temperature;
}

// In the accumulation type T. `args` must outlive it.
template <class T>
class Contrast {
 public:
  explicit Contrast(const ContrastArgs& args)
      : args_(args),
        kernels_(tile_kernels<T>()),
        scale_(static_cast<T>(1 / temperature_of<T>(args))),
        anchor_order_(order_by_label(args.anchor_labels, args.num_anchors, args.views, args.ignore_index)),
        key_order_(args.symmetric
                       ? Order{}
                       : order_by_label(args.key_labels, args.num_keys, args.key_views, args.ignore_index)),
        matches_(match(anchor_order_, key_order(), args)),
        anchors_(gathered(anchor_order_, args.anchors)),
        keys_(args.symmetric ? Buffer<T>(0) : gathered(key_order_, args.keys)),
        anchor_blocks_{anchor_order_.size(), block_size(anchor_order_.size())},
        key_blocks_{key_order().size(), block_size(key_order().size())},
        transposed_keys_(transposed_keys()) {}

  const Order& anchor_order() const { return anchor_order_; }
  const Order& key_order() const { return args_.symmetric ? anchor_order_ : key_order_; }
  const Matches& matches() const { return matches_; }
  const Blocks& anchor_blocks() const { return anchor_blocks_; }
  const Blocks& key_blocks() const { return key_blocks_; }
  const TileKernels<T>& kernels() const { return kernels_; }
  bool symmetric() const { return args_.symmetric; }
  T scale() const { return scale_; }
  T beta() const { return static_cast<T>(args_.beta); }
  Hardness<T> hardness() const { return clce::hardness(beta()); }
  int64_t stride() const { return args_.stride; }
  const T* anchor(int64_t block) const { return anchors_.get() + anchor_blocks_.begin(block) * stride(); }
  const T* key(int64_t block) const {
    return (args_.symmetric ? anchors_ : keys_).get() + key_blocks_.begin(block) * stride();
  }

  // What one task needs to hold a tile.
  struct Workspace {
    explicit Workspace(const Contrast& c)
        : dots(c.anchor_blocks_.size * c.key_blocks_.size), ranges(c.anchor_blocks_.size) {}
    Buffer<T> dots;
    std::vector<RowRange> ranges;
  };

  // Dot products of anchor block i with key block j, and each row's positives among them.
  Tile<T> tile(int64_t i, int64_t j, Workspace& work) const {
    const int64_t rows = anchor_blocks_.length(i), cols = key_blocks_.length(j), ld = key_blocks_.size;
    if (keys_are_transposed()) {
      gemm(Transpose::kNo, Transpose::kNo, rows, cols, args_.dim, anchor(i), stride(), transposed_key(j), ld,
           false, work.dots.get(), ld);
    } else {
      gemm(Transpose::kNo, Transpose::kYes, rows, cols, args_.dim, anchor(i), stride(), key(j), stride(),
           false, work.dots.get(), ld);
    }
    find_ranges(anchor_blocks_.begin(i), rows, key_blocks_.begin(j), cols, work.ranges);
    return {work.dots.get(), rows, cols, ld, work.ranges.data(), scale_, beta()};
  }

  // The same tile seen from its columns (symmetric contrast only).
  Tile<T> transposed(const Tile<T>& tile, int64_t i, int64_t j, Workspace& work) const {
    const int64_t ld = anchor_blocks_.size;
    kernels_.transpose(tile.dots, tile.rows, tile.cols, tile.ld, work.dots.get(), ld);
    find_ranges(key_blocks_.begin(j), tile.cols, anchor_blocks_.begin(i), tile.rows, work.ranges);
    return {work.dots.get(), tile.cols, tile.rows, ld, work.ranges.data(), scale_, beta()};
  }

  // task(i, j, workspace) over all tiles; a task may add to the rows of i and, symmetric, of j.
  template <class Task>
  void for_tiles(const Task& task) const {
    if (args_.symmetric) {
      for_symmetric_pairs(anchor_blocks_.count(), with_workspace(task));
    } else {
      in_parallel(anchor_blocks_.count(), [&](int64_t i) {
        Workspace work(*this);
        for (int64_t j = 0; j < key_blocks_.count(); ++j) task(i, j, work);
      });
    }
  }

  // The same for tasks that add to key rows too.
  template <class Task>
  void for_tiles_of_both_sides(const Task& task) const {
    for_disjoint_pairs(anchor_blocks_.count(), key_blocks_.count(), with_workspace(task));
  }

  // The same for tasks that add to key rows only.
  template <class Task>
  void for_tiles_by_key(const Task& task) const {
    in_parallel(key_blocks_.count(), [&](int64_t j) {
      Workspace work(*this);
      for (int64_t i = 0; i < anchor_blocks_.count(); ++i) task(i, j, work);
    });
  }

 private:
  template <class Task>
  auto with_workspace(const Task& task) const {
    return [this, &task](int64_t i, int64_t j) {
      Workspace work(*this);
      task(i, j, work);
    };
  }

  // Of the rows that begin at first_row, the positives and the row itself among `cols` columns from
  // first_col.
  void find_ranges(int64_t first_row, int64_t rows, int64_t first_col, int64_t cols,
                   std::vector<RowRange>& ranges) const {
    const auto inside = [&](int64_t col) { return std::min(std::max<int64_t>(col - first_col, 0), cols); };
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r, self = matches_.self[row];
      const bool has_self = self >= first_col && self < first_col + cols;
      ranges[r] = {inside(matches_.pos_begin[row]), inside(matches_.pos_end[row]),
                   has_self ? self - first_col : -1};
    }
  }

  Buffer<T> gathered(const Order& order, const void* rows) const {
    Buffer<T> out(order.size() * args_.stride);
    gather_rows(order, args_.dtype, rows, args_.stride, out.get());
    return out;
  }

  // BLAS multiplies small tiles about twice as fast when it need not transpose their right side; of large
  // ones it makes better copies itself.
  bool keys_are_transposed() const { return key_blocks_.size < 256; }

  Buffer<T> transposed_keys() const {
    if (!keys_are_transposed()) return Buffer<T>(0);
    Buffer<T> out(key_blocks_.count() * args_.dim * key_blocks_.size);
    in_parallel(key_blocks_.count(), [&](int64_t j) {
      kernels_.transpose(key(j), key_blocks_.length(j), args_.dim, stride(),
                         out.get() + j * args_.dim * key_blocks_.size, key_blocks_.size);
    });
    return out;
  }

  // The block's columns as rows [dim, key_blocks().size].
  const T* transposed_key(int64_t block) const {
    return transposed_keys_.get() + block * args_.dim * key_blocks_.size;
  }

  const ContrastArgs& args_;
  const TileKernels<T>& kernels_;
  const T scale_;
  const Order anchor_order_, key_order_;
  const Matches matches_;
  const Buffer<T> anchors_, keys_;
  const Blocks anchor_blocks_, key_blocks_;
  const Buffer<T> transposed_keys_;
};

}  // namespace clce::cpu
