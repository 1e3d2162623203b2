// What kernels of rows take, made of what the backend is given.
#pragma once

#include "cuda/arguments.cuh"
#include "cuda/kernels/merge_loss.cuh"
#include "cuda/kernels/prepare.cuh"
#include "cuda/plan/plan.h"

namespace clce::cuda {

// Whether rows can be accessed 16 bytes at a time.
template <class Element>
bool vectors_fit(const void* pointer, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_stride * int64_t(sizeof(Element)) % 16 == 0;
}

inline int64_t row_blocks(int64_t rows) {
  return ceil_div(rows, kRowsPerBlock);
}

template <class Params>
Sides<Params> sides(const Params& first, const Params& second) {
  return {{first, second}, uint32_t(row_blocks(first.rows))};
}

template <class Element>
PrepareParams<Element, AccumulationType<Element>> prepare_params(const PrepareArgs& args) {
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
  return p;
}

template <class T>
void set_loss(MergeLossParams<T>& p, const LossArgs& args) {
  p.with_loss = true;
  p.config = args.config;
  p.debias = static_cast<const T*>(args.debias);
  p.scale = scale_of<T>(args);
  p.each_row = args.reduction == Reduction::kNone;
  p.mean = args.reduction == Reduction::kMean;
  p.loss = static_cast<T*>(args.loss);
  p.num_terms = static_cast<T*>(args.num_terms);
  p.derivatives = static_cast<T*>(args.derivatives);
}

template <class T>
MergeLossParams<T> merge_params(const ForwardArgs& args, const ForwardPlan& plan) {
  const ContrastArgs& c = args.contrast;
  unsigned char* const workspace = static_cast<unsigned char*>(args.workspace);
  MergeLossParams<T> p{};
  p.rows = c.num_anchors;
  p.slots = reinterpret_cast<const T*>(workspace + plan.slots_at);
  p.num_slots = plan.groups;
  p.unbounded = !plan.engine.bounded;
  p.beta = T(c.beta);
  p.statistics = static_cast<T*>(args.statistics);
  if (args.with_loss) set_loss(p, args.loss);
  p.scale = scale_of<T>(c, plan.engine);
  p.scale.decides &= !plan.panels;
  p.block_sums = reinterpret_cast<T*>(workspace + plan.block_sums_at);
  p.ticket = reinterpret_cast<uint32_t*>(workspace);
  return p;
}

}  // namespace clce::cuda
