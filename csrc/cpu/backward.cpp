// The backward pass on the CPU: the vector code (tile.h) turns each tile's dot products into gradients of the
// logits in place; two matrix products add them to the gradients of both sides.
#include <algorithm>
#include <cmath>

#include "backend.h"
#include "cpu/contrast.h"
#include "dispatch.h"

namespace clce::cpu {
namespace {

// Of every anchor, in the contrast's order: the loss's derivatives by its statistics, times everything that
// is the same for a whole row of logits.
template <class T>
class AnchorCoefficients {
 public:
  AnchorCoefficients(const BackwardArgs& args, const Order& order, T scale) : arrays_(order.size()) {
    const int64_t rows = args.contrast.num_anchors;
    const T* statistics = static_cast<const T*>(args.statistics);
    const T* derivatives = static_cast<const T*>(args.derivatives);
    const T* upstream = static_cast<const T*>(args.upstream);
    const T beta = static_cast<T>(args.contrast.beta);
    const T terms = args.num_terms != nullptr ? std::max(*static_cast<const T*>(args.num_terms), T(1)) : T(1);
    for (int64_t i = 0; i < order.size(); ++i) {
      const int64_t row = order.source[i];
      const T factor = (upstream != nullptr ? upstream[row * args.upstream_stride] : T(1)) * scale / terms;
      const Derivatives<T> d = load_derivatives(derivatives, rows, row);
      const Statistics<T> s = load_statistics(statistics, rows, row);
      const T by_lse[] = {factor * d.lse_pos, factor * d.lse_w * beta, factor * d.lse_wn * (1 + beta)};
      const T lse[] = {s.lse_pos, s.lse_w, s.lse_wn}, lse_low[] = {s.lse_pos_low, s.lse_w_low, s.lse_wn_low};
      arrays_[0][i] = factor * d.sum_pos;
      for (int k = 0; k < 3; ++k) {
        // Bounded: e^(s - lse) = e^s e^-lse, both factors well inside the exponent's range. A derivative of 0
        // belongs to an empty set, whose e^-lse is infinite.
        const bool with_lse = args.contrast.bounded && by_lse[k] != 0;
        arrays_[1 + k][i] =
            with_lse ? static_cast<T>(by_lse[k] * std::exp(-double(lse[k]) - double(lse_low[k]))) : by_lse[k];
        arrays_[4 + k][i] = lse[k];
        arrays_[7 + k][i] = lse_low[k];
      }
    }
  }

  Coefficients<T> from(int64_t first) {
    const auto array = [&](int k) { return arrays_[k] + first; };
    return {array(0), array(1), array(2), array(3), array(4),
            array(5), array(6), array(7), array(8), array(9)};
  }

 private:
  RowArrays<T, 10> arrays_;  // in the order of Coefficients
};

template <class T>
void backward_as(const BackwardArgs& args) {
  using Workspace = typename Contrast<T>::Workspace;
  const ContrastArgs& contrast = args.contrast;
  const Contrast<T> c(contrast);
  const int64_t stride = c.stride();
  AnchorCoefficients<T> coefficients(args, c.anchor_order(), c.scale());
  const auto kernel = contrast.bounded ? c.kernels().backward_bounded : c.kernels().backward_unbounded;

  const bool want_anchors = args.danchors != nullptr, want_keys = args.dkeys != nullptr;
  const auto zeros = [&](bool wanted, int64_t count) {
    Buffer<T> out(wanted ? count * stride : 0);
    if (wanted) std::fill_n(out.get(), count * stride, T(0));
    return out;
  };
  const Buffer<T> danchors = zeros(want_anchors, c.anchor_order().size());
  const Buffer<T> dkeys = zeros(want_keys, c.key_order().size());

  const auto gradient_tile = [&](int64_t i, int64_t j, Workspace& work) {
    const Tile<T> tile = c.tile(i, j, work);
    const Coefficients<T> rows = coefficients.from(c.anchor_blocks().begin(i));
    const Coefficients<T> cols = coefficients.from(contrast.symmetric ? c.key_blocks().begin(j) : 0);
    kernel(tile, rows, contrast.symmetric ? &cols : nullptr);
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

  if (contrast.symmetric) {
    // G + G^T is symmetric: the tile above the diagonal serves both of its blocks.
    c.for_tiles([&](int64_t i, int64_t j, Workspace& work) {
      const Tile<T> tile = gradient_tile(i, j, work);
      add_to_anchors(tile, i, j);
      if (i != j) add_to_keys(tile, i, j, danchors);
    });
  } else if (want_anchors && want_keys) {
    c.for_tiles_of_both_sides([&](int64_t i, int64_t j, Workspace& work) {
      const Tile<T> tile = gradient_tile(i, j, work);
      add_to_anchors(tile, i, j);
      add_to_keys(tile, i, j, dkeys);
    });
  } else if (want_anchors) {
    c.for_tiles(
        [&](int64_t i, int64_t j, Workspace& work) { add_to_anchors(gradient_tile(i, j, work), i, j); });
  } else if (want_keys) {
    c.for_tiles_by_key(
        [&](int64_t i, int64_t j, Workspace& work) { add_to_keys(gradient_tile(i, j, work), i, j, dkeys); });
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

size_t backward_workspace_bytes(const ContrastArgs&) {
  return 0;
}

void backward(const BackwardArgs& args, void* stream) {
  with_accumulation_type(args.contrast.dtype, [&](auto acc) { backward_as<decltype(acc)>(args); });
  const auto project = [&](PrepareBackwardArgs side, const void* gradient) {
    side.dz = gradient;
    if (side.dx != nullptr || side.dots != nullptr) prepare_backward(side, stream);
  };
  project(args.project_anchors, args.danchors);
  project(args.project_keys, args.dkeys);
}

}  // namespace clce::cpu
