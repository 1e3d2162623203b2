// The backward pass of one format, from the plan to the launch.
#pragma once

#include <type_traits>

#include "cuda/arguments.cuh"
#include "cuda/kernels/backward_resident.cuh"
#include "cuda/kernels/backward_streaming.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/engine.h"
#include "cuda/sm80/shapes.cuh"

namespace clce::cuda::sm80 {

template <class Shape>
constexpr bool shape_matches(const BackwardTile& tile) {
  return Shape::Logits::kM == tile.rows && Shape::Logits::kN == tile.columns &&
         Shape::Gradients::kN == tile.width && Shape::kMinBlocks == tile.blocks &&
         Shape::kUnbounded == tile.unbounded;
}

template <class... Items>
constexpr bool shapes_match(const EngineTiles& tiles, List<Items...>) {
  int i = 0;
  return sizeof...(Items) == tiles.num_backward && (shape_matches<Items>(tiles.backward[i++]) && ...);
}

template <class Shape>
constexpr bool kIsResident = false;
template <class Logits, class Gradients, int kStages, int kMinBlocks>
constexpr bool kIsResident<ResidentShape<Logits, Gradients, kStages, kMinBlocks>> = true;

template <class Product, class Shape, bool kUnbounded>
constexpr auto traits_of() {
  if constexpr (kIsResident<Shape>) {
    return ResidentTraits<Product, Shape, kUnbounded>{};
  } else {
    return StreamingTraits<Product, Shape, kUnbounded>{};
  }
}

template <class T>
T* in_workspace(const BackwardArgs& args, size_t at) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(args.workspace) + at);
}

template <class Element, class T>
void launch_find_unit(const BackwardArgs& args, const BackwardPlan& plan, void* stream) {
  const auto anchors = anchor_side<Element, T>(args), keys = key_side<Element, T>(args);
  const FindUnitParams<Element, T> params{anchors, keys, T(args.contrast.beta),
                                          in_workspace<T>(args, plan.unit_at)};
  launch(find_unit_kernel<Element, T>, "find_unit_kernel", Grid{}, kUnitThreads,
         kUnitThreads / 32 * 2 * sizeof(T), stream, params);
}

// Of one side. If its gradient is not wanted, it has no blocks.
template <class Element, class T>
GradientParams<Element, T> gradient_params(const BackwardArgs& args, const GradientPlan& plan,
                                           bool owner_is_keys) {
  void* const total = owner_is_keys ? args.dkeys : args.danchors;
  if (!total) return {};
  const auto anchors = anchor_side<Element, T>(args), keys = key_side<Element, T>(args);
  const int64_t self_offset = args.contrast.self_offset;
  GradientParams<Element, T> params{};
  params.owner = owner_is_keys ? keys : anchors;
  params.other = owner_is_keys ? anchors : keys;
  params.self_offset = owner_is_keys ? -self_offset : self_offset;
  params.row_tiles = uint32_t(plan.row_tiles);
  params.splits = uint32_t(plan.splits);
  params.gradient = plan.splits > 1 ? in_workspace<T>(args, plan.shares_at) : static_cast<T*>(total);
  return params;
}

template <class Product, class Shape, bool kUnbounded>
void launch_backward(const BackwardArgs& given, const BackwardPlan& plan, void* stream) {
  using Traits = decltype(traits_of<Product, Shape, kUnbounded>());
  using Element = typename Product::Element;
  using T = typename Product::Acc;
  static_assert(shared_fits(Traits::kSharedBytes, Traits::kMinBlocks), "as many as planned, on every device");
  const ContrastArgs& args = given.contrast;
  const auto anchors = gradient_params<Element, T>(given, plan.anchors, false);
  const auto keys = gradient_params<Element, T>(given, plan.keys, true);
  const uint32_t anchor_blocks = anchors.row_tiles * anchors.splits;
  typename Traits::Params params{};
  params.gradients = {{anchors, keys}, anchor_blocks};
  params.scale = scale_of<T>(args, plan.engine);
  params.beta = T(args.beta);
  params.has_self = args.has_self;
  params.dim = args.dim;
  params.stride = args.stride;
  params.upstream = given.upstream_stride == 0 ? static_cast<const T*>(given.upstream) : nullptr;
  params.num_terms = static_cast<const T*>(given.num_terms);
  if (plan.finds_unit) params.unit = in_workspace<T>(given, plan.unit_at);
  const Grid grid{anchor_blocks + keys.row_tiles * keys.splits, uint32_t(plan.chunks)};
  launch(backward_kernel<Traits>, "backward_kernel", grid, Traits::kThreads, Traits::kSharedBytes, stream,
         params);
}

template <Format format>
void backward_tiles(const BackwardArgs& args, const BackwardPlan& plan, void* stream) {
  using Shapes = sm80::Shapes<format>;
  using Product = typename Shapes::Product;
  static_assert(shapes_match(sm80_tiles(format), typename Shapes::Backward{}), "the plan's tiles");
  if constexpr (kHasUnit<typename Product::Element>) {
    using Element = typename Product::Element;
    if (plan.finds_unit) launch_find_unit<Element, typename Product::Acc>(args, plan, stream);
  }
  with_item(typename Shapes::Backward{}, plan.tile, [&](auto shape) {
    using Shape = decltype(shape);
    if (plan.engine.bounded || plan.engine.temperature_decides) {
      launch_backward<Product, Shape, false>(args, plan, stream);
    }
    if constexpr (Shape::kUnbounded) {
      if (!plan.engine.bounded) launch_backward<Product, Shape, true>(args, plan, stream);
    }
  });
}

}  // namespace clce::cuda::sm80
