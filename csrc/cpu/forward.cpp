// The forward pass on the CPU: the vector code (tile.h) turns each tile's dot products into sums, which are
// added to their rows and become statistics.
#include <algorithm>
#include <limits>
#include <vector>

#include "backend.h"
#include "cpu/contrast.h"
#include "dispatch.h"

namespace clce::cpu {
namespace {

template <class T>
using Workspace = typename Contrast<T>::Workspace;

// How many positives and negatives a row has, which is known from the order alone.
template <class T>
void count_pairs(const Contrast<T>& c, int64_t row, PartialSums<double>& sums) {
  const Matches& m = c.matches();
  const int64_t self = m.self[row], begin = m.pos_begin[row], end = m.pos_end[row];
  const bool has_self = self >= 0;
  const bool self_is_positive = has_self && self >= begin && self < end;
  sums.n_pos = static_cast<double>(end - begin - self_is_positive);
  sums.n_neg = static_cast<double>(c.key_order().size() - has_self) - sums.n_pos;
}

// Both functions below keep the sums over tiles in double: a row of a large batch has thousands of tiles.
template <class T>
void add_bounded(const Contrast<T>& c, std::vector<PartialSums<double>>& sums) {
  const auto arrays_of = [](RowArrays<T, 4>& arrays) {
    return BoundedSums<T>{arrays[0], arrays[1], arrays[2], arrays[3]};
  };
  c.for_tiles([&](int64_t i, int64_t j, Workspace<T>& work) {
    const Tile<T> tile = c.tile(i, j, work);
    RowArrays<T, 4> rows(tile.rows), cols(tile.cols);
    const BoundedSums<T> row_sums = arrays_of(rows), col_sums = arrays_of(cols);
    const bool both = c.symmetric() && i != j;
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
  // At beta 0 every hardness weight is 1 and the vector code leaves exp_w out.
  if (c.beta() == 0) {
    for (PartialSums<double>& s : sums) s.exp_w = s.n_neg;
  }
}

template <class T>
void add_unbounded(const Contrast<T>& c, std::vector<PartialSums<double>>& sums) {
  const Hardness<double> h = widened(c.hardness());
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  c.for_tiles([&](int64_t i, int64_t j, Workspace<T>& work) {
    const auto add_rows = [&](const Tile<T>& tile, int64_t first) {
      RowArrays<T, 6> arrays(tile.rows);
      const UnboundedSums<T> from{arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5]};
      std::fill_n(from.max_pos, tile.rows, kNothing);
      std::fill_n(from.max_neg, tile.rows, kNothing);
      c.kernels().forward_unbounded(tile, from);
      for (int64_t r = 0; r < tile.rows; ++r) {
        PartialSums<double> of_tile;
        // merge() only asks whether there are any; count_pairs() gives the numbers afterwards.
        of_tile.n_pos = from.max_pos[r] != kNothing || from.exp_pos[r] != 0;
        of_tile.n_neg = from.max_neg[r] != kNothing || from.exp_w[r] != 0;
        of_tile.sum_pos = from.sum_pos[r];
        of_tile.max_pos = from.max_pos[r];
        of_tile.exp_pos = from.exp_pos[r];
        of_tile.max_neg = from.max_neg[r];
        of_tile.exp_w = from.exp_w[r];
        of_tile.exp_wn = from.exp_wn[r];
        merge(sums[first + r], of_tile, h);
      }
    };
    const Tile<T> tile = c.tile(i, j, work);
    add_rows(tile, c.anchor_blocks().begin(i));
    if (c.symmetric() && i != j) {
      Workspace<T> other(c);
      add_rows(c.transposed(tile, i, j, other), c.key_blocks().begin(j));
    }
  });
}

template <class T>
void forward_as(const ForwardArgs& args) {
  const ContrastArgs& contrast = args.contrast;
  const Contrast<T> c(contrast);
  const Order& order = c.anchor_order();
  std::vector<PartialSums<double>> sums(order.size());
  const auto count = [&] {
    for (int64_t row = 0; row < order.size(); ++row) count_pairs(c, row, sums[row]);
  };
  if (contrast.bounded) {
    count();
    add_bounded(c, sums);
  } else {
    add_unbounded(c, sums);
    count();
  }

  T* statistics = static_cast<T*>(args.statistics);
  const Statistics<T> of_ignored = finalize(PartialSums<T>{}, c.hardness());
  for (int64_t row = 0; row < contrast.num_anchors; ++row) {
    store_statistics(statistics, contrast.num_anchors, row, of_ignored);
  }
  for (int64_t row = 0; row < order.size(); ++row) {
    store_statistics(statistics, contrast.num_anchors, order.source[row],
                     rounded<T>(finalize(sums[row], widened(c.hardness()))));
  }
}

}  // namespace

size_t forward_workspace_bytes(const ContrastArgs&) {
  return 0;
}

void forward(const ForwardArgs& args, void* stream) {
  for (const PrepareArgs* side : {&args.prepare_anchors, &args.prepare_keys}) {
    if (side->x != nullptr) prepare(*side, stream);
  }
  with_accumulation_type(args.contrast.dtype, [&](auto acc) { forward_as<decltype(acc)>(args); });
  if (args.with_loss) {
    LossArgs loss_args = args.loss;
    loss_args.statistics = args.statistics;
    loss(loss_args, stream);
  }
}

}  // namespace clce::cpu
