// The forward pass by panels.
#include "cuda/arguments.cuh"
#include "cuda/panels/engine.h"
#include "cuda/panels/launches.cuh"
#include "cuda/panels/panel_sums.cuh"

namespace clce::cuda {
namespace {

template <class T, bool kUnbounded>
void forward_as(const ForwardArgs& given, const ForwardPlan& plan, void* stream) {
  using Traits = PanelSumsTraits<T, kUnbounded>;
  using F = typename Traits::F;
  constexpr PanelShape kTile = panel_tile(sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
  static_assert(F::kM == kTile.rows && F::kN == kTile.columns, "the plan's tiles");
  const ContrastArgs& args = given.contrast;
  unsigned char* const workspace = static_cast<unsigned char*>(given.workspace);
  T* const dots = reinterpret_cast<T*>(workspace + plan.panel_at);
  typename Traits::Params params{};
  params.dots = dots;
  params.stride = uint32_t(plan.shape.columns);
  params.anchor_labels = anchor_labels(args);
  params.key_labels = key_labels(args);
  params.scale = scale_of<T>(args);
  params.beta = T(args.beta);
  params.symmetric = args.symmetric;
  params.has_self = args.has_self;
  params.self_offset = args.self_offset;
  params.num_anchors = args.num_anchors;
  params.slots = reinterpret_cast<T*>(workspace + plan.slots_at);
  params.row_slots = int(ceil_div(plan.shape.columns, F::kN));

  // The merge's ticket and the slots.
  clear(workspace, plan.panel_at, stream);
  for_each_panel(args, plan.shape, [&](const Panel& panel) {
    multiply_logits(args, panel, dots, params.stride, stream);
    params.panel = panel;
    launch(panel_sums_kernel<Traits>, "panel_sums_kernel", panel_grid(panel, F::kM, F::kN), Traits::kThreads,
           Traits::kSharedBytes, stream, params);
  });
}

}  // namespace

void forward_panels(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  with_accumulation_type(args.contrast.dtype, [&](auto zero) {
    using T = decltype(zero);
    plan.engine.bounded ? forward_as<T, false>(args, plan, stream) : forward_as<T, true>(args, plan, stream);
  });
}

}  // namespace clce::cuda
