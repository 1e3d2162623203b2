// Normalisation of embeddings and its derivative: one warp per row.
#pragma once

#include <type_traits>

#include "backend.h"
#include "cuda/grid.h"
#include "cuda/kernels/block_reduce.cuh"
#include "cuda/kernels/sides.cuh"
#include "dispatch.h"

namespace clce::cuda {

// Calls use(params of the side, row) for the row that this warp has as one of the given block's, if there is
// one.
template <class Params, class Use>
CLCE_DEVICE void with_row(const Sides<Params>& p, uint32_t block, Use use) {
  const Params& side = p.of(block);
  const int64_t row = int64_t(p.block_of_side(block)) * kRowsPerBlock + threadIdx.x / 32;
  if (row < side.rows) use(side, row);
}

CLCE_DEVICE float to_acc(ptx::bf16 x) {
  return ptx::to_float(x);
}
CLCE_DEVICE float to_acc(ptx::f16 x) {
  return ptx::to_float(x);
}
CLCE_DEVICE float to_acc(float x) {
  return x;
}
CLCE_DEVICE double to_acc(double x) {
  return x;
}

template <class Element, class T>
CLCE_DEVICE Element from_acc(T x) {
  if constexpr (std::is_same_v<Element, ptx::bf16>) {
    return ptx::to_bf16(x);
  } else if constexpr (std::is_same_v<Element, ptx::f16>) {
    return ptx::to_f16(x);
  } else {
    return x;
  }
}

template <class Element, class T>
struct PrepareParams {
  int64_t rows, dim;
  const Element* x;
  int64_t x_row_stride, x_col_stride;
  bool vectors;  // rows of x can be read 16 bytes at a time
  Element* z;
  T* norms;
  bool normalize;
};

// Calls use(col, count, values) for all columns of this lane, 16 bytes of them at a time.
template <class Element, class Use>
CLCE_DEVICE void for_columns(const PrepareParams<Element, AccumulationType<Element>>& p, int64_t row,
                             Use use) {
  using Pack = ptx::Pack<Element>;
  const Element* const x = p.x + row * p.x_row_stride;
  const int64_t padded = padded_dim(p.dim);
  for (int64_t col = int64_t(threadIdx.x % 32) * Pack::kSize; col < padded; col += 32 * Pack::kSize) {
    Pack values;
    if (p.vectors && col + Pack::kSize <= p.dim) {
      values = ptx::global_load(reinterpret_cast<const Pack*>(x + col));
    } else {
#pragma unroll
      for (int i = 0; i < Pack::kSize; ++i) {
        values.values[i] = col + i < p.dim ? ptx::global_load(x + (col + i) * p.x_col_stride) : Element{};
      }
    }
    use(col, values);
  }
}

// By all lanes of a warp.
template <class Element>
CLCE_DEVICE void prepare_row(const PrepareParams<Element, AccumulationType<Element>>& p, int64_t row) {
  using T = AccumulationType<Element>;
  using Pack = ptx::Pack<Element>;
  T factor = 1;
  if (p.normalize) {
    T squares = 0;
    for_columns<Element>(p, row, [&](int64_t, const Pack& x) {
#pragma unroll
      for (int i = 0; i < Pack::kSize; ++i) squares += to_acc(x.values[i]) * to_acc(x.values[i]);
    });
    const T norm = std::sqrt(warp_reduce(squares, Add{}));
    if (threadIdx.x % 32 == 0) ptx::global_store(p.norms + row, norm);
    // Written so that NaN stays NaN.
    factor = 1 / (norm < T(kNormEps) ? T(kNormEps) : norm);
  }
  for_columns<Element>(p, row, [&](int64_t col, const Pack& x) {
    Pack z;
#pragma unroll
    for (int i = 0; i < Pack::kSize; ++i) {
      z.values[i] = p.normalize ? from_acc<Element>(to_acc(x.values[i]) * factor) : x.values[i];
    }
    ptx::global_store(reinterpret_cast<Pack*>(p.z + row * padded_dim(p.dim) + col), z);
  });
}

template <class Element>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(32 * kRowsPerBlock, 1)
    prepare_kernel(Sides<PrepareParams<Element, AccumulationType<Element>>> p) {
  with_row(p, blockIdx.x, [](const auto& side, int64_t row) { prepare_row<Element>(side, row); });
}

template <class Element, class T>
struct PrepareBackwardParams {
  int64_t rows, dim;
  const Element* z;
  const T* norms;
  T* dz;  // [shares][rows][stride], of which the sum is the gradient; if several, the first is used up
  int64_t shares;
  Element* dx;
  bool vectors;  // rows of dx can be written 16 bytes at a time
  T* dots;
  bool normalize;
};

// The largest finite number of the type: what a gradient over 1e-12 becomes in float16.
template <class Element, class T>
CLCE_DEVICE T clamp_to_finite(T x) {
  if constexpr (std::is_same_v<Element, ptx::f16>) {
    const T top = T(65504);
    return x > top ? top : x < -top ? -top : x;
  } else {
    return x;
  }
}

// By all lanes of a warp.
template <class Element>
CLCE_DEVICE void prepare_backward_row(const PrepareBackwardParams<Element, AccumulationType<Element>>& p,
                                      int64_t row) {
  using T = AccumulationType<Element>;
  using Pack = ptx::Pack<Element>;
  using Part = ptx::Pack<T>;
  constexpr int kSize = Pack::kSize;
  constexpr int kParts = kSize / Part::kSize;  // 16-byte pieces of dz per piece of z
  const int lane = int(threadIdx.x) % 32;
  const int64_t padded = padded_dim(p.dim);
  const Element* const z = p.z + row * padded;
  T* const dz = p.dz + row * padded;
  int64_t shares = p.shares;
  // In the order of the shares.
  const auto load_dz = [&](int64_t col, T(&values)[kSize]) {
    const auto add_share = [&](int64_t share, bool first) {
      const T* const from = dz + share * p.rows * padded + col;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const Part part = ptx::global_load(reinterpret_cast<const Part*>(from) + i);
#pragma unroll
        for (int j = 0; j < Part::kSize; ++j) {
          T& value = values[i * Part::kSize + j];
          value = first ? part.values[j] : value + part.values[j];
        }
      }
    };
    add_share(0, true);
#pragma unroll 2
    for (int64_t share = 1; share < shares; ++share) add_share(share, false);
  };

  T dot = 0;
  if (p.normalize || p.dots) {
    for (int64_t col = int64_t(lane) * kSize; col < padded; col += 32 * kSize) {
      const Pack zs = ptx::global_load(reinterpret_cast<const Pack*>(z + col));
      T dzs[kSize];
      load_dz(col, dzs);
#pragma unroll
      for (int i = 0; i < kSize; ++i) dot += to_acc(zs.values[i]) * dzs[i];
      // The sum, where this lane alone reads it again.
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        Part part;
#pragma unroll
        for (int j = 0; j < Part::kSize; ++j) part.values[j] = dzs[i * Part::kSize + j];
        if (shares > 1) ptx::global_store(reinterpret_cast<Part*>(dz + col) + i, part);
      }
    }
    shares = 1;
    dot = warp_reduce(dot, Add{});
    if (p.dots && lane == 0) ptx::global_store(p.dots + row, dot);
  }
  if (!p.dx) return;
  T factor = 1, along = 0;
  bool tiny = false;
  if (p.normalize) {
    const T norm = ptx::global_load(p.norms + row);
    tiny = norm < T(kNormEps);
    factor = 1 / (tiny ? T(kNormEps) : norm);
    along = tiny ? T(0) : dot;
  }
  for (int64_t col = int64_t(lane) * kSize; col < p.dim; col += 32 * kSize) {
    const Pack zs = ptx::global_load(reinterpret_cast<const Pack*>(z + col));
    T dzs[kSize];
    load_dz(col, dzs);
    Pack dx;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const T value = (dzs[i] - to_acc(zs.values[i]) * along) * factor;
      dx.values[i] = from_acc<Element>(tiny ? clamp_to_finite<Element>(value) : value);
    }
    Element* const to = p.dx + row * p.dim + col;
    if (p.vectors && col + kSize <= p.dim) {
      ptx::global_store(reinterpret_cast<Pack*>(to), dx);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (col + i < p.dim) ptx::global_store(to + i, dx.values[i]);
      }
    }
  }
}

template <class Element>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(32 * kRowsPerBlock, 1)
    prepare_backward_kernel(Sides<PrepareBackwardParams<Element, AccumulationType<Element>>> p) {
  with_row(p, blockIdx.x, [](const auto& side, int64_t row) { prepare_backward_row<Element>(side, row); });
}

}  // namespace clce::cuda
