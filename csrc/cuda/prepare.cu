// The passes over rows: checks what can be vectorised and launches.
#include "cuda/kernels/prepare.cuh"

#include "cuda/launch.cuh"
#include "cuda/row_arguments.cuh"
#include "cuda/rows.h"
#include "dispatch.h"

namespace clce::cuda {
namespace {

template <class Params>
void launch_sides(void (*kernel)(Sides<Params>), const char* name, const Params& first, const Params& second,
                  void* stream) {
  const Grid grid{uint32_t(row_blocks(first.rows) + row_blocks(second.rows))};
  launch(kernel, name, grid, 32 * kRowsPerBlock, 0, stream, sides(first, second));
}

template <class Element>
PrepareBackwardParams<Element, AccumulationType<Element>> params_of(const Projection& given) {
  using T = AccumulationType<Element>;
  const PrepareBackwardArgs& args = given.args;
  PrepareBackwardParams<Element, T> p{};
  if (!args.dx && !args.dots) return p;  // no rows
  p.rows = args.rows;
  p.dim = args.dim;
  p.z = static_cast<const Element*>(args.z);
  p.norms = static_cast<const T*>(args.norms);
  p.dz = static_cast<T*>(const_cast<void*>(args.dz));  // a single share is only read
  p.shares = given.shares;
  p.dx = static_cast<Element*>(args.dx);
  p.vectors = vectors_fit<Element>(args.dx, args.dim);
  p.dots = static_cast<T*>(args.dots);
  p.normalize = args.normalize;
  return p;
}

}  // namespace

void prepare_sides(DType dtype, const PrepareArgs& first, const PrepareArgs& second, void* stream) {
  with_element_type<ptx::bf16, ptx::f16>(dtype, [&](auto zero) {
    using Element = decltype(zero);
    launch_sides(prepare_kernel<Element>, "prepare_kernel", prepare_params<Element>(first),
                 prepare_params<Element>(second), stream);
  });
}

void project_sides(DType dtype, const Projection& first, const Projection& second, void* stream) {
  with_element_type<ptx::bf16, ptx::f16>(dtype, [&](auto zero) {
    using Element = decltype(zero);
    launch_sides(prepare_backward_kernel<Element>, "prepare_backward_kernel", params_of<Element>(first),
                 params_of<Element>(second), stream);
  });
}

void prepare(const PrepareArgs& args, void* stream) {
  prepare_sides(args.dtype, args, {}, stream);
}

void prepare_backward(const PrepareBackwardArgs& args, void* stream) {
  project_sides(args.dtype, {args}, {}, stream);
}

}  // namespace clce::cuda
