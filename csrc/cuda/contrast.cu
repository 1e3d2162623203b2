// The passes over pairs: what the plan says, launched in order.
#include "cuda/kernels/reduce.cuh"
#include "cuda/kernels/temperature_gradient.cuh"
#include "cuda/launch.cuh"
#include "cuda/panels/engine.h"
#include "cuda/plan/engines.h"
#include "cuda/row_arguments.cuh"
#include "cuda/rows.h"
#include "dispatch.h"

namespace clce::cuda {
namespace {

template <class T>
void merge_as(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  if (args.contrast.num_anchors == 0 && !args.with_loss) return;
  launch(merge_loss_kernel<T>, "merge_loss_kernel", Grid{uint32_t(plan.merge_blocks)}, kMergeThreads,
         kMergeBytes<T>, stream, merge_params<T>(args, plan));
}

template <class T>
void loss_as(const LossArgs& args, void* stream) {
  MergeLossParams<T> p{};
  p.rows = args.num_anchors;
  p.statistics = const_cast<T*>(static_cast<const T*>(args.statistics));
  set_loss(p, args);
  constexpr int kThreads = kLossThreads<T>;
  // Shared memory: a loss and a count per warp.
  launch(loss_kernel<T>, "loss_kernel", Grid{}, kThreads, kThreads / 32 * 2 * sizeof(T), stream, p);
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

bool is_wanted(const PrepareBackwardArgs& projection) {
  return projection.dx || projection.dots;
}

// What is left to do for a side's gradient, `total`, where its tiles have been launched.
Projection finish_gradient(const BackwardArgs& args, const GradientPlan& plan, void* total, int64_t rows,
                           const PrepareBackwardArgs& project, void* stream) {
  if (!total) return {};
  const void* const shares = static_cast<unsigned char*>(args.workspace) + plan.shares_at;
  Projection projection{project, plan.splits};
  projection.args.dz = plan.splits > 1 ? shares : total;
  if (plan.splits > 1 && !is_wanted(project)) {
    const ContrastArgs& c = args.contrast;
    with_accumulation_type(c.dtype, [&](auto zero) {
      reduce_as<decltype(zero)>(shares, total, rows * c.stride, plan.splits, stream);
    });
  }
  return projection;
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
  const bool raw = args.prepare_anchors.x && (args.contrast.symmetric || args.prepare_keys.x);
  if (raw && plan.whole_grid.x > 0 && forward_whole(args, plan, stream)) return;
  prepare_sides(args.contrast.dtype, args.prepare_anchors, args.prepare_keys, stream);
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
  Projection anchors, keys;
  if (plan.panels) {
    backward_panels(args, plan, stream);
    anchors.args = args.project_anchors;
    anchors.args.dz = args.danchors;
    keys.args = args.project_keys;
    keys.args.dz = args.dkeys;
  } else {
    const ContrastArgs& c = args.contrast;
    backward_tiles(args, plan, stream);
    anchors = finish_gradient(args, plan.anchors, args.danchors, c.num_anchors, args.project_anchors, stream);
    keys = finish_gradient(args, plan.keys, args.dkeys, c.num_keys, args.project_keys, stream);
  }
  project_sides(args.contrast.dtype, anchors, keys, stream);
}

void temperature_gradient(const TemperatureGradientArgs& args, void* stream) {
  with_accumulation_type(args.given.contrast.dtype,
                         [&](auto zero) { temperature_gradient_as<decltype(zero)>(args, stream); });
}

}  // namespace clce::cuda
