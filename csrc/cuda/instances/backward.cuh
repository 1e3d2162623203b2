// The backward pass of one engine, from the arguments to the launch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/kernels/backward.cuh"
#include "cuda/passes.h"
#include "cuda/tile/shapes.cuh"

namespace clce::cuda {

// Calls use(Shape) with the narrowest shape that makes the fewest chunks of `stride` columns.
template <class Use, class First, class... Rest>
void with_backward_shape(List<First, Rest...>, int64_t stride, Use use) {
  if constexpr (sizeof...(Rest) == 0) {
    use(First{});
  } else {
    constexpr int kWidest = std::max({First::Gradients::kN, Rest::Gradients::kN...});
    const int64_t chunks = ceil_div(stride, kWidest);
    if (ceil_div(stride, First::Gradients::kN) <= chunks) {
      use(First{});
    } else {
      with_backward_shape(List<Rest...>{}, stride, use);
    }
  }
}

// Calls use(Shape, std::bool_constant<any logits>).
template <class Engine, class Use>
void with_backward(const ContrastArgs& args, Use use) {
  if (args.bounded) {
    with_backward_shape(typename Shapes<Engine>::Backward{}, args.stride,
                        [&](auto shape) { use(shape, std::bool_constant<false>{}); });
  } else {
    with_backward_shape(typename Shapes<Engine>::BackwardAny{}, args.stride,
                        [&](auto shape) { use(shape, std::bool_constant<true>{}); });
  }
}

template <class Engine>
BackwardPlan plan_backward(const ContrastArgs& args, bool owner_is_keys) {
  const int64_t rows = owner_is_keys ? args.num_keys : args.num_anchors;
  const int64_t others = owner_is_keys ? args.num_anchors : args.num_keys;
  BackwardPlan plan{};
  with_backward<Engine>(args, [&](auto shape, auto) {
    using Shape = decltype(shape);
    plan.row_tiles = ceil_div(rows, Shape::Logits::kM);
    plan.chunks = ceil_div(args.stride, Shape::Gradients::kN);
    // Where few blocks own rows, several share the other side, and a small launch adds up what they made.
    constexpr int64_t kFilling = 128 * Shape::kMinBlocks, kMaxSplits = 16, kWorthSplitting = 4;
    const int64_t blocks = plan.row_tiles * plan.chunks;
    const int64_t tiles = ceil_div(others, Shape::Logits::kN);
    int64_t splits = blocks > 0 ? kFilling / blocks : 1;
    if (splits > tiles) splits = tiles;
    if (splits > kMaxSplits) splits = kMaxSplits;
    plan.splits = splits > 1 && tiles >= kWorthSplitting ? splits : 1;
  });
  return plan;
}

template <class Engine, class Shape, bool kMaxima>
void launch_backward(const BackwardArgs& args, const GradientPass& pass, void* stream) {
  using Traits = BackwardTraits<Engine, Shape, kMaxima>;
  using Element = typename Engine::Element;
  using T = typename Engine::Acc;
  const ContrastArgs& c = args.contrast;
  const T* const grad_loss = static_cast<const T*>(args.upstream);
  Side<Element, T> anchors{}, keys{};
  anchors.rows = {static_cast<const Element*>(c.anchors), c.num_anchors, c.stride};
  anchors.labels = make_labels(c.anchor_labels, c.num_anchors, c.views, c.ignore_index);
  anchors.statistics = static_cast<const T*>(args.statistics);
  anchors.derivatives = static_cast<const T*>(args.derivatives);
  anchors.weights = args.upstream_stride != 0 ? grad_loss : nullptr;
  if (c.symmetric) {
    keys = anchors;
  } else {
    keys.rows = {static_cast<const Element*>(c.keys), c.num_keys, c.stride};
    keys.labels = make_labels(c.key_labels, c.num_keys, c.key_views, c.ignore_index);
  }
  typename Traits::Params params{};
  params.owner = pass.owner_is_keys ? keys : anchors;
  params.other = pass.owner_is_keys ? anchors : keys;
  params.scale = {static_cast<const T*>(c.temperature_ptr), T(1 / c.temperature)};
  params.beta = T(c.beta);
  params.has_self = c.has_self;
  params.self_offset = pass.owner_is_keys ? -c.self_offset : c.self_offset;
  params.dim = c.dim;
  params.grad_loss = args.upstream_stride == 0 ? grad_loss : nullptr;
  params.num_terms = static_cast<const T*>(args.num_terms);
  params.gradient = static_cast<T*>(pass.gradient);
  const int64_t row_tiles = ceil_div(params.owner.rows.rows, Traits::kM);
  const int64_t chunks = ceil_div(c.stride, Traits::kDims);
  const Grid grid{uint32_t(row_tiles), uint32_t(chunks), uint32_t(pass.splits)};
  launch(backward_kernel<Traits>, "backward_kernel", grid, Traits::kThreads, Traits::kSharedBytes, stream,
         params);
}

template <class Engine>
void backward_tiles(const BackwardArgs& args, const GradientPass& pass, void* stream) {
  with_backward<Engine>(args.contrast, [&](auto shape, auto any_logits) {
    launch_backward<Engine, decltype(shape), decltype(any_logits)::value>(args, pass, stream);
  });
}

#define CLCE_INSTANTIATE_BACKWARD(Engine)                                 \
  template BackwardPlan plan_backward<Engine>(const ContrastArgs&, bool); \
  template void backward_tiles<Engine>(const BackwardArgs&, const GradientPass&, void*);

}  // namespace clce::cuda
