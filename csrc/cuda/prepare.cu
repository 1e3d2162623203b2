// prepare and prepare_backward: checks what can be vectorised and launches.
#include "cuda/kernels/prepare.cuh"

#include "cuda/launch.cuh"
#include "dispatch.h"

namespace clce::cuda {
namespace {

template <class Element>
bool vectors_fit(const void* pointer, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_stride * int64_t(sizeof(Element)) % 16 == 0;
}

Grid grid_of(int64_t rows) {
  return {uint32_t(ceil_div(rows, kRowsPerBlock))};
}

template <class Element>
void prepare_as(const PrepareArgs& args, void* stream) {
  using T = AccumulationType<Element>;
  PrepareParams<Element, T> p{};
  p.rows = args.rows;
  p.dim = args.dim;
  p.x = static_cast<const Element*>(args.x);
  p.x_row_stride = args.x_row_stride;
  p.x_col_stride = args.x_col_stride;
  p.vectors = args.x_col_stride == 1 && vectors_fit<Element>(args.x, args.x_row_stride);
  p.z = static_cast<Element*>(args.z);
  p.norms = static_cast<T*>(args.norms);
  p.normalize = args.normalize;
  launch(prepare_kernel<Element>, "prepare_kernel", grid_of(args.rows), 32 * kRowsPerBlock, 0, stream, p);
}

template <class Element>
void prepare_backward_as(const PrepareBackwardArgs& args, void* stream) {
  using T = AccumulationType<Element>;
  PrepareBackwardParams<Element, T> p{};
  p.rows = args.rows;
  p.dim = args.dim;
  p.z = static_cast<const Element*>(args.z);
  p.norms = static_cast<const T*>(args.norms);
  p.dz = static_cast<const T*>(args.dz);
  p.dx = static_cast<Element*>(args.dx);
  p.vectors = vectors_fit<Element>(args.dx, args.dim);
  p.dots = static_cast<T*>(args.dots);
  p.normalize = args.normalize;
  launch(prepare_backward_kernel<Element>, "prepare_backward_kernel", grid_of(args.rows), 32 * kRowsPerBlock,
         0, stream, p);
}

}  // namespace

void prepare(const PrepareArgs& args, void* stream) {
  with_element_type<ptx::bf16, ptx::f16>(args.dtype,
                                         [&](auto zero) { prepare_as<decltype(zero)>(args, stream); });
}

void prepare_backward(const PrepareBackwardArgs& args, void* stream) {
  with_element_type<ptx::bf16, ptx::f16>(
      args.dtype, [&](auto zero) { prepare_backward_as<decltype(zero)>(args, stream); });
}

}  // namespace clce::cuda
