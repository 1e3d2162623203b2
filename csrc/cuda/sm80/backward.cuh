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
T* unit_in(const BackwardArgs& args, const GradientPlan& plan) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(args.workspace) + plan.unit_at);
}

template <class Element, class T>
void launch_find_unit(const BackwardArgs& args, const GradientPlan& plan, void* stream) {
  const auto anchors = anchor_side<Element, T>(args), keys = key_side<Element, T>(args);
  const FindUnitParams<Element, T> params{anchors, keys, T(args.contrast.beta), unit_in<T>(args, plan)};
  launch(find_unit_kernel<Element, T>, "find_unit_kernel", Grid{}, kUnitThreads,
         kUnitThreads / 32 * 2 * sizeof(T), stream, params);
}

template <class Product, class Shape, bool kUnbounded>
void launch_backward(const BackwardArgs& given, const GradientPlan& plan, void* stream) {
  using Traits = decltype(traits_of<Product, Shape, kUnbounded>());
  using Element = typename Product::Element;
  using T = typename Product::Acc;
  static_assert(shared_fits(Traits::kSharedBytes, Traits::kMinBlocks), "as many as planned, on every device");
  const ContrastArgs& args = given.contrast;
  const auto anchors = anchor_side<Element, T>(given), keys = key_side<Element, T>(given);
  typename Traits::Params params{};
  params.owner = plan.owner_is_keys ? keys : anchors;
  params.other = plan.owner_is_keys ? anchors : keys;
  params.scale = scale_of<T>(args, plan.engine);
  params.beta = T(args.beta);
  params.has_self = args.has_self;
  params.self_offset = plan.owner_is_keys ? -args.self_offset : args.self_offset;
  params.dim = args.dim;
  params.upstream = given.upstream_stride == 0 ? static_cast<const T*>(given.upstream) : nullptr;
  params.num_terms = static_cast<const T*>(given.num_terms);
  void* const gradient = plan.owner_is_keys ? given.dkeys : given.danchors;
  params.gradient = static_cast<T*>(plan.splits > 1 ? given.workspace : gradient);
  if (plan.finds_unit) params.unit = unit_in<T>(given, plan);
  launch(backward_kernel<Traits>, "backward_kernel", plan.grid, Traits::kThreads, Traits::kSharedBytes,
         stream, params);
}

template <Format format>
void backward_tiles(const BackwardArgs& args, const GradientPlan& plan, void* stream) {
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
