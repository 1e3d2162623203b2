// The forward pass of one format, from the plan to the launch.
#pragma once

#include "cuda/arguments.cuh"
#include "cuda/kernels/forward.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/engine.h"
#include "cuda/sm80/shapes.cuh"

namespace clce::cuda::sm80 {

template <class Product, class Shape>
constexpr bool shape_matches(int rows, const ForwardBlock& block) {
  using Traits = ForwardTraits<Product, Shape, false>;
  return Shape::Logits::kM == rows && Traits::kThreads == 32 * block.warps &&
         Traits::kMinBlocks == block.blocks && Traits::kSharedBytes <= 1024 * block.shared_kib;
}

template <class Product, class... Items>
constexpr bool shapes_match(const EngineTiles& tiles, List<Items...>) {
  int i = 0;
  return sizeof...(Items) == 2 &&
         ((shape_matches<Product, Items>(tiles.forward[i], tiles.forward_block[i]) && ++i) && ...);
}

template <class Traits>
typename Traits::Params forward_params(const ForwardArgs& given, const ForwardPlan& plan) {
  using Element = typename Traits::Product::Element;
  using T = typename Traits::T;
  const ContrastArgs& args = given.contrast;
  unsigned char* const workspace = static_cast<unsigned char*>(given.workspace);
  typename Traits::Params params{};
  params.anchors = anchor_rows<Element>(args);
  params.keys = key_rows<Element>(args);
  params.anchor_labels = anchor_labels(args);
  params.key_labels = key_labels(args);
  params.scale = scale_of<T>(args, plan.engine);
  params.beta = T(args.beta);
  params.symmetric = args.symmetric;
  params.has_self = args.has_self;
  params.self_offset = args.self_offset;
  params.groups = int(plan.groups);
  params.slots = reinterpret_cast<T*>(workspace + plan.slots_at);
  params.ticket = reinterpret_cast<uint32_t*>(workspace);
  return params;
}

template <class Product, class Shape, bool kUnbounded>
void launch_forward(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  using Traits = ForwardTraits<Product, Shape, kUnbounded>;
  static_assert(shared_fits(Traits::kSharedBytes, 1), "every device since sm_80 can run it");
  launch(forward_kernel<Traits>, "forward_kernel", plan.grid, Traits::kThreads, Traits::kSharedBytes, stream,
         forward_params<Traits>(args, plan));
}

template <Format format>
void forward_tiles(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  using Shapes = sm80::Shapes<format>;
  using Product = typename Shapes::Product;
  static_assert(shapes_match<Product>(sm80_tiles(format), typename Shapes::Forward{}), "the plan's tiles");
  with_item(typename Shapes::Forward{}, plan.tile, [&](auto shape) {
    using Shape = decltype(shape);
    if (plan.engine.bounded || plan.engine.temperature_decides) {
      launch_forward<Product, Shape, false>(args, plan, stream);
    }
    if (!plan.engine.bounded) launch_forward<Product, Shape, true>(args, plan, stream);
  });
}

}  // namespace clce::cuda::sm80
