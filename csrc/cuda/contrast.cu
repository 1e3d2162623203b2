// The passes over pairs: what the plan says, launched in order.
#include "cuda/arguments.cuh"
#include "cuda/kernels/merge_loss.cuh"
#include "cuda/kernels/reduce.cuh"
#include "cuda/kernels/temperature_gradient.cuh"
#include "cuda/launch.cuh"
#include "cuda/panels/engine.h"
#include "cuda/plan/engines.h"
#include "dispatch.h"

namespace clce::cuda {
namespace {

template <class T>
void fill_loss(MergeLossParams<T>& p, const LossArgs& args) {
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
void launch_merge_loss(const MergeLossParams<T>& p, int64_t blocks, int threads, void* stream) {
  // Shared memory: a loss and a count per warp.
  launch(merge_loss_kernel<T>, "merge_loss_kernel", Grid{uint32_t(blocks)}, threads,
         size_t(threads) / 32 * 2 * sizeof(T), stream, p);
}

template <class T>
void merge_as(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  static_assert(kMergeThreads <= kLossThreads<T>, "the kernel's launch bounds");
  const ContrastArgs& c = args.contrast;
  if (c.num_anchors == 0 && !args.with_loss) return;
  unsigned char* const workspace = static_cast<unsigned char*>(args.workspace);
  MergeLossParams<T> p{};
  p.rows = c.num_anchors;
  p.merge = true;
  p.slots = reinterpret_cast<const T*>(workspace + plan.slots_at);
  p.num_slots = plan.groups;
  p.unbounded = !plan.engine.bounded;
  p.beta = T(c.beta);
  p.statistics = static_cast<T*>(args.statistics);
  if (args.with_loss) fill_loss(p, args.loss);
  p.scale = scale_of<T>(c, plan.engine);
  p.scale.decides &= !plan.panels;
  p.block_sums = reinterpret_cast<T*>(workspace + plan.block_sums_at);
  p.ticket = reinterpret_cast<uint32_t*>(workspace);
  launch_merge_loss(p, plan.merge_blocks, kMergeThreads, stream);
}

template <class T>
void loss_as(const LossArgs& args, void* stream) {
  MergeLossParams<T> p{};
  p.rows = args.num_anchors;
  p.statistics = const_cast<T*>(static_cast<const T*>(args.statistics));
  fill_loss(p, args);
  launch_merge_loss(p, 1, kLossThreads<T>, stream);
}

template <class T>
void reduce_as(const void* shares, void* total, int64_t count, int64_t splits, void* stream) {
  const ReduceParams<T> p{static_cast<const T*>(shares), static_cast<T*>(total), count, splits};
  const int64_t per_block = kReduceThreads * int64_t(ptx::Pack<T>::kSize);
  launch(reduce_kernel<T>, "reduce_kernel", Grid{uint32_t(ceil_div(count, per_block))}, kReduceThreads, 0,
         stream, p);
}

template <class T>
void temperature_gradient_as(const TemperatureGradientArgs& args, void* stream) {
  const ContrastArgs& c = args.given.contrast;
  const T* const upstream = static_cast<const T*>(args.given.upstream);
  TemperatureGradientParams<T> p{};
  p.dots = static_cast<const T*>(args.dots);
  p.rows = args.rows;
  p.symmetric = c.symmetric;
  p.by_scale = static_cast<const T*>(args.given.derivatives) + kDScale * c.num_anchors;
  p.anchors = c.num_anchors;
  (args.given.upstream_stride != 0 ? p.upstream_of_rows : p.upstream) = upstream;
  p.num_terms = static_cast<const T*>(args.given.num_terms);
  p.scale = scale_of<T>(c);
  p.gradient = static_cast<T*>(args.gradient);
  // Shared memory: two sums per warp.
  launch(temperature_gradient_kernel<T>, "temperature_gradient_kernel", Grid{1}, kTemperatureThreads,
         kTemperatureThreads / 32 * 2 * sizeof(double), stream, p);
}

void gradient(const BackwardArgs& args, const GradientPlan& plan, void* stream) {
  const ContrastArgs& c = args.contrast;
  void* const total = plan.owner_is_keys ? args.dkeys : args.danchors;
  if (!total) return;
  backward_tiles(args, plan, stream);
  if (plan.splits == 1) return;
  const int64_t rows = plan.owner_is_keys ? c.num_keys : c.num_anchors;
  with_accumulation_type(c.dtype, [&](auto zero) {
    reduce_as<decltype(zero)>(args.workspace, total, rows * c.stride, plan.splits, stream);
  });
}

Device current_device() {
  return {architecture_of(compute_capability()), shared_bytes_of_multiprocessor()};
}

}  // namespace

size_t forward_workspace_bytes(const ContrastArgs& args) {
  return plan_forward(args, current_device()).workspace_bytes;
}

void forward(const ForwardArgs& args, void* stream) {
  const ForwardPlan plan = plan_forward(args.contrast, current_device());
  plan.panels ? forward_panels(args, plan, stream) : forward_tiles(args, plan, stream);
  with_accumulation_type(args.contrast.dtype,
                         [&](auto zero) { merge_as<decltype(zero)>(args, plan, stream); });
}

void loss(const LossArgs& args, void* stream) {
  with_accumulation_type(args.dtype, [&](auto zero) { loss_as<decltype(zero)>(args, stream); });
}

size_t backward_workspace_bytes(const ContrastArgs& args) {
  return plan_backward(args, current_device()).workspace_bytes;
}

void backward(const BackwardArgs& args, void* stream) {
  const BackwardPlan plan = plan_backward(args.contrast, current_device());
  if (plan.panels) return backward_panels(args, plan, stream);
  gradient(args, plan.anchors, stream);
  if (!args.contrast.symmetric) gradient(args, plan.keys, stream);
}

void temperature_gradient(const TemperatureGradientArgs& args, void* stream) {
  with_accumulation_type(args.given.contrast.dtype,
                         [&](auto zero) { temperature_gradient_as<decltype(zero)>(args, stream); });
}

}  // namespace clce::cuda
