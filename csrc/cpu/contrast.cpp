// The CPU backend: walks the tiles (schedule.h), computes each one's dot products (gemm.h), lets the
// vector code turn them into sums or gradients (tile.h) and adds those to their rows.
#include "backend.h"

#include <array>
#include <cmath>
#include <stdexcept>

#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cpu/schedule.h"
#include "cpu/tile.h"

namespace clce::cpu {
namespace {

// Rows of a tile: two blocks of embeddings and the tile itself should fit a core's L2; small batches are
// cut finer so that there is something to share among threads. Depends on the sizes alone.
int64_t block_size(int64_t rows) {
  if (rows >= 2048) return 256;
  if (rows >= 768) return 128;
  return std::max<int64_t>(16, (rows / 4 + 15) / 16 * 16);
}

// Everything that forward and backward share: both sides ordered by class, their blocks, their tiles.
template <class T>
class Contrast {
 public:
  explicit Contrast(const ContrastArgs& args)
      : args_(args),
        kernels_(tile_kernels<T>()),
        scale_(
            static_cast<T>(1 / (args.temperature_ptr != nullptr ? *static_cast<const T*>(args.temperature_ptr)
                                                                : args.temperature))),
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
  T scale() const { return scale_; }
  T beta() const { return static_cast<T>(args_.beta); }
  int64_t stride() const { return args_.stride; }
  const T* anchor(int64_t block) const { return anchors_.get() + anchor_blocks_.begin(block) * stride(); }
  const T* key(int64_t block) const {
    return (args_.symmetric ? anchors_ : keys_).get() + key_blocks_.begin(block) * stride();
  }

  // The block's columns as rows [dim, key_blocks().size].
  const T* transposed_key(int64_t block) const {
    return transposed_keys_.get() + block * args_.dim * key_blocks_.size;
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
    const int64_t first_col = key_blocks_.begin(j);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = anchor_blocks_.begin(i) + r;
      const auto inside = [&](int64_t col) { return std::min(std::max<int64_t>(col - first_col, 0), cols); };
      const int64_t self = matches_.self[row] - first_col;
      work.ranges[r] = {inside(matches_.pos_begin[row]), inside(matches_.pos_end[row]),
                        matches_.self[row] >= 0 && self >= 0 && self < cols ? self : -1};
    }
    return {work.dots.get(), rows, cols, ld, work.ranges.data(), scale_, beta()};
  }

  // The same tile seen from its columns (symmetric contrast only).
  Tile<T> transposed(const Tile<T>& tile, int64_t i, int64_t j, Workspace& work) const {
    kernels_.transpose(tile.dots, tile.rows, tile.cols, tile.ld, work.dots.get(), anchor_blocks_.size);
    for (int64_t r = 0; r < tile.cols; ++r) {
      const int64_t row = key_blocks_.begin(j) + r, first_col = anchor_blocks_.begin(i);
      const auto inside = [&](int64_t col) {
        return std::min(std::max<int64_t>(col - first_col, 0), tile.rows);
      };
      work.ranges[r] = {inside(matches_.pos_begin[row]), inside(matches_.pos_end[row]), -1};
    }
    return {work.dots.get(), tile.cols, tile.rows, anchor_blocks_.size, work.ranges.data(), scale_, beta()};
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

  const ContrastArgs& args_;
  const TileKernels<T>& kernels_;
  const T scale_;
  const Order anchor_order_, key_order_;
  const Matches matches_;
  const Buffer<T> anchors_, keys_;
  const Blocks anchor_blocks_, key_blocks_;
  const Buffer<T> transposed_keys_;
};

// A few arrays of one number per row, in one piece of memory.
template <class T, int kArrays>
class RowArrays {
 public:
  explicit RowArrays(int64_t rows, T value = 0) : rows_(rows), memory_(kArrays * rows, value) {}
  T* operator[](int array) { return memory_.data() + array * rows_; }
  void fill(int array, T value) { std::fill_n((*this)[array], rows_, value); }

 private:
  int64_t rows_;
  std::vector<T> memory_;
};

// ---- forward ----

template <class T>
BoundedSums<T> bounded_sums(RowArrays<T, 4>& arrays) {
  return {arrays[0], arrays[1], arrays[2], arrays[3]};
}

// Sums over tiles are kept in double: a row of a large batch has thousands of tiles.
template <class T>
void forward_bounded(const Contrast<T>& c, bool symmetric, std::vector<PartialSums<double>>& sums) {
  c.for_tiles([&](int64_t i, int64_t j, typename Contrast<T>::Workspace& work) {
    const Tile<T> tile = c.tile(i, j, work);
    RowArrays<T, 4> rows(tile.rows), cols(tile.cols);
    const BoundedSums<T> row_sums = bounded_sums(rows), col_sums = bounded_sums(cols);
    const bool both = symmetric && i != j;
    c.kernels().forward_bounded(tile, row_sums, both ? &col_sums : nullptr);
    const auto add = [&](int64_t first, int64_t count, const BoundedSums<T>& from) {
      for (int64_t r = 0; r < count; ++r) {
        PartialSums<double>& to = sums[first + r];
        to.sum_pos += from.sum_pos[r];
        to.exp_pos += from.exp_pos[r];
        to.exp_w += from.exp_w[r];
        to.exp_wn += from.exp_wn[r];
      }
    };
    add(c.anchor_blocks().begin(i), tile.rows, row_sums);
    if (both) add(c.key_blocks().begin(j), tile.cols, col_sums);
  });
  // At beta 0 every weight is 1 and the tiles do not count.
  if (c.beta() == 0) {
    for (PartialSums<double>& s : sums) s.exp_w = s.n_neg;
  }
}

template <class T>
void forward_general(const Contrast<T>& c, bool symmetric, std::vector<PartialSums<double>>& sums) {
  c.for_tiles([&](int64_t i, int64_t j, typename Contrast<T>::Workspace& work) {
    const auto add_rows = [&](const Tile<T>& tile, int64_t first) {
      RowArrays<T, 6> rows(tile.rows);
      rows.fill(1, -INFINITY);
      rows.fill(3, -INFINITY);
      c.kernels().forward_general(tile, {rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]});
      for (int64_t r = 0; r < tile.rows; ++r) {
        // Counts stand for "not empty"; the true ones are known from the order.
        PartialSums<double> from;
        from.n_pos = rows[1][r] != -INFINITY || rows[2][r] != 0;
        from.n_neg = rows[3][r] != -INFINITY || rows[4][r] != 0;
        from.sum_pos = rows[0][r];
        from.max_pos = rows[1][r];
        from.exp_pos = rows[2][r];
        from.max_neg = rows[3][r];
        from.exp_w = rows[4][r];
        from.exp_wn = rows[5][r];
        merge(sums[first + r], from, static_cast<double>(c.beta()));
      }
    };
    const Tile<T> tile = c.tile(i, j, work);
    add_rows(tile, c.anchor_blocks().begin(i));
    if (symmetric && i != j) {
      typename Contrast<T>::Workspace other(c);
      add_rows(c.transposed(tile, i, j, other), c.key_blocks().begin(j));
    }
  });
}

template <class T>
void forward_as(const ForwardArgs& args) {
  const ContrastArgs& contrast = args.contrast;
  const Contrast<T> c(contrast);
  const int64_t rows = c.anchor_order().size();
  const double beta = contrast.beta;
  const auto count = [&](int64_t row, PartialSums<double>& sums) {
    const bool self = c.matches().self[row] >= 0;
    const bool self_is_positive = self && c.matches().self[row] >= c.matches().pos_begin[row] &&
                                  c.matches().self[row] < c.matches().pos_end[row];
    sums.n_pos =
        static_cast<double>(c.matches().pos_end[row] - c.matches().pos_begin[row] - self_is_positive);
    sums.n_neg = static_cast<double>(c.key_order().size() - self) - sums.n_pos;
  };
  std::vector<PartialSums<double>> sums(rows);
  if (contrast.bounded) {
    for (int64_t row = 0; row < rows; ++row) count(row, sums[row]);
    forward_bounded(c, contrast.symmetric, sums);
  } else {
    forward_general(c, contrast.symmetric, sums);
    for (int64_t row = 0; row < rows; ++row) count(row, sums[row]);
  }

  T* statistics = static_cast<T*>(args.statistics);
  const Statistics<T> empty = finalize(PartialSums<T>{}, T(beta));
  for (int64_t row = 0; row < contrast.num_anchors; ++row) {
    store_statistics(statistics, contrast.num_anchors, row, empty);  // ignored anchors keep it
  }
  for (int64_t row = 0; row < rows; ++row) {
    store_statistics(statistics, contrast.num_anchors, c.anchor_order().source[row],
                     rounded<T>(finalize(sums[row], beta)));
  }
  if (args.with_loss) {
    LossArgs loss_args = args.loss;
    loss_args.statistics = statistics;
    loss(loss_args, nullptr);
  }
}

// ---- loss ----

template <class T>
void loss_as(const LossArgs& args) {
  const int64_t rows = args.num_anchors;
  const T* statistics = static_cast<const T*>(args.statistics);
  T* derivatives = static_cast<T*>(args.derivatives);
  T* out = static_cast<T*>(args.loss);
  const double temperature =
      args.temperature_ptr != nullptr ? *static_cast<const T*>(args.temperature_ptr) : args.temperature;
  double sum = 0, terms = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const AnchorLoss<T> term =
        anchor_loss(load_statistics(statistics, rows, row), args.config, T(1 / temperature));
    store_derivatives(derivatives, rows, row, term.d);
    sum += term.value;
    terms += term.is_term;
    if (args.reduction == Reduction::kNone) out[row] = term.value;
  }
  if (args.reduction == Reduction::kSum) out[0] = static_cast<T>(sum);
  if (args.reduction == Reduction::kMean) out[0] = static_cast<T>(sum / std::max(terms, 1.0));
  *static_cast<T*>(args.num_terms) = static_cast<T>(terms);
}

// ---- backward ----

// One side's derivatives by its statistics, times everything that is the same for a whole row.
template <class T>
struct RowGradients {
  RowGradients(const BackwardArgs& args, const Order& order, T scale) : arrays(order.size()) {
    const int64_t rows = args.contrast.num_anchors;
    const T* statistics = static_cast<const T*>(args.statistics);
    const T* derivatives = static_cast<const T*>(args.derivatives);
    const T* grad_loss = static_cast<const T*>(args.upstream);
    const T beta = static_cast<T>(args.contrast.beta);
    const T terms = args.num_terms != nullptr ? std::max(*static_cast<const T*>(args.num_terms), T(1)) : T(1);
    for (int64_t i = 0; i < order.size(); ++i) {
      const int64_t row = order.source[i];
      const T factor = (grad_loss != nullptr ? grad_loss[row * args.upstream_stride] : T(1)) * scale / terms;
      arrays[0][i] = factor * derivatives[kDSumPos * rows + row];
      arrays[1][i] = factor * derivatives[kDLsePos * rows + row];
      arrays[2][i] = factor * derivatives[kDLseW * rows + row] * beta;
      arrays[3][i] = factor * derivatives[kDLseWn * rows + row] * (1 + beta);
      const Statistics<T> s = load_statistics(statistics, rows, row);
      const T lse[] = {s.lse_pos, s.lse_w, s.lse_wn}, lse_low[] = {s.lse_pos_low, s.lse_w_low, s.lse_wn_low};
      for (int k = 0; k < 3; ++k) {
        // Bounded: e^(s - lse) = e^s e^-lse, both factors well inside the exponent's range. A derivative of 0
        // belongs to an empty set, whose e^-lse is infinite.
        T& derivative = arrays[1 + k][i];
        if (args.contrast.bounded && derivative != 0) {
          derivative = static_cast<T>(derivative * std::exp(-double(lse[k]) - double(lse_low[k])));
        }
        arrays[4 + k][i] = lse[k];
        arrays[7 + k][i] = lse_low[k];
      }
    }
  }
  BoundedFactors<T> bounded(int64_t first) {
    return {arrays[0] + first, arrays[1] + first, arrays[2] + first, arrays[3] + first};
  }
  GeneralFactors<T> general(int64_t first) {
    return {arrays[0] + first, arrays[1] + first, arrays[2] + first, arrays[3] + first, arrays[4] + first,
            arrays[5] + first, arrays[6] + first, arrays[7] + first, arrays[8] + first, arrays[9] + first};
  }
  RowArrays<T, 10> arrays;
};

template <class T>
void backward_as(const BackwardArgs& args) {
  const ContrastArgs& contrast = args.contrast;
  const Contrast<T> c(contrast);
  const int64_t stride = c.stride();
  RowGradients<T> rows(args, c.anchor_order(), c.scale());

  const bool want_anchors = args.danchors != nullptr, want_keys = args.dkeys != nullptr;
  const auto zeros = [&](bool wanted, int64_t count) {
    Buffer<T> out(wanted ? count * stride : 0);
    if (wanted) std::fill_n(out.get(), count * stride, T(0));
    return out;
  };
  const Buffer<T> danchors = zeros(want_anchors, c.anchor_order().size());
  const Buffer<T> dkeys = zeros(want_keys, c.key_order().size());

  const auto gradient_tile = [&](int64_t i, int64_t j, typename Contrast<T>::Workspace& work) {
    const Tile<T> tile = c.tile(i, j, work);
    const int64_t first_row = c.anchor_blocks().begin(i), first_col = c.key_blocks().begin(j);
    if (contrast.bounded) {
      const BoundedFactors<T> cols = rows.bounded(contrast.symmetric ? first_col : 0);
      c.kernels().backward_bounded(tile, rows.bounded(first_row), contrast.symmetric ? &cols : nullptr);
    } else {
      const GeneralFactors<T> cols = rows.general(contrast.symmetric ? first_col : 0);
      c.kernels().backward_general(tile, rows.general(first_row), contrast.symmetric ? &cols : nullptr);
    }
    return tile;
  };
  const auto add_to_anchors = [&](const Tile<T>& tile, int64_t i, int64_t j) {
    gemm(Transpose::kNo, Transpose::kNo, tile.rows, stride, tile.cols, tile.dots, tile.ld, c.key(j), stride,
         true, danchors.get() + c.anchor_blocks().begin(i) * stride, stride);
  };
  const auto add_to_keys = [&](const Tile<T>& tile, int64_t i, int64_t j, const Buffer<T>& out) {
    gemm(Transpose::kYes, Transpose::kNo, tile.cols, stride, tile.rows, tile.dots, tile.ld, c.anchor(i),
         stride, true, out.get() + c.key_blocks().begin(j) * stride, stride);
  };
  using Work = typename Contrast<T>::Workspace;

  if (contrast.symmetric) {
    // G + G^T is symmetric: the tile above the diagonal serves both of its blocks.
    c.for_tiles([&](int64_t i, int64_t j, Work& work) {
      const Tile<T> tile = gradient_tile(i, j, work);
      add_to_anchors(tile, i, j);
      if (i != j) add_to_keys(tile, i, j, danchors);
    });
  } else if (want_anchors && want_keys) {
    c.for_tiles_of_both_sides([&](int64_t i, int64_t j, Work& work) {
      const Tile<T> tile = gradient_tile(i, j, work);
      add_to_anchors(tile, i, j);
      add_to_keys(tile, i, j, dkeys);
    });
  } else if (want_anchors) {
    c.for_tiles([&](int64_t i, int64_t j, Work& work) { add_to_anchors(gradient_tile(i, j, work), i, j); });
  } else if (want_keys) {
    c.for_tiles_by_key(
        [&](int64_t i, int64_t j, Work& work) { add_to_keys(gradient_tile(i, j, work), i, j, dkeys); });
  }
  if (want_anchors) {
    scatter_rows(c.anchor_order(), danchors.get(), contrast.num_anchors, stride,
                 static_cast<T*>(args.danchors));
  }
  if (want_keys) {
    scatter_rows(c.key_order(), dkeys.get(), contrast.num_keys, stride, static_cast<T*>(args.dkeys));
  }
}

}  // namespace

size_t forward_workspace_bytes(const ContrastArgs&) {
  return 0;
}
size_t backward_workspace_bytes(const ContrastArgs&) {
  return 0;
}

void forward(const ForwardArgs& args, void*) {
  args.contrast.dtype == DType::kFloat64 ? forward_as<double>(args) : forward_as<float>(args);
}
void loss(const LossArgs& args, void*) {
  args.dtype == DType::kFloat64 ? loss_as<double>(args) : loss_as<float>(args);
}
void backward(const BackwardArgs& args, void*) {
  args.contrast.dtype == DType::kFloat64 ? backward_as<double>(args) : backward_as<float>(args);
}

}  // namespace clce::cpu
