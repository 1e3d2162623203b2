// The forward pass of one engine, from the arguments to the launch.
#pragma once

#include "cuda/kernels/forward.cuh"
#include "cuda/passes.h"
#include "cuda/tile/shapes.cuh"

namespace clce::cuda {

// Blocks that keep the largest devices busy.
constexpr int64_t kFillingBlocks = 128;
// Each costs six or eight numbers per anchor of scratch.
constexpr int64_t kMaxGroups = 32, kMaxSplits = 128;

inline int64_t triangle(int64_t n) {
  return n * (n + 1) / 2;
}

template <class Engine>
ForwardPlan plan_forward(const ContrastArgs& args) {
  using Large = typename Shapes<Engine>::ForwardLarge::Logits;
  using Small = typename Shapes<Engine>::ForwardSmall::Logits;
  const auto tiles = [](int64_t rows, int tile) { return ceil_div(rows, tile); };
  const int64_t large_rows = tiles(args.num_anchors, Large::kM), large_cols = tiles(args.num_keys, Large::kN);
  ForwardPlan plan{};
  plan.large_tiles = (args.symmetric ? triangle(large_rows) : large_rows * large_cols) >= kFillingBlocks;
  const int tile = plan.large_tiles ? Large::kM : Small::kM;
  const int64_t col_tiles = tiles(args.num_keys, tile);
  plan.row_tiles = tiles(args.num_anchors, tile);
  if (args.symmetric) {
    plan.groups = col_tiles < kMaxGroups ? col_tiles : kMaxGroups;
  } else {
    // About four blocks for each that runs, so that the last ones leave little idle.
    int64_t splits = ceil_div(4 * kFillingBlocks, plan.row_tiles > 0 ? plan.row_tiles : 1);
    if (splits > kMaxSplits) splits = kMaxSplits;
    plan.groups = splits < col_tiles ? splits : col_tiles;
  }
  return plan;
}

template <class Engine, class Shape, bool kMaxima>
void launch_forward(const ContrastArgs& args, const ForwardPlan& plan, void* slots, uint32_t* ticket,
                    void* stream) {
  using Traits = ForwardTraits<Engine, Shape, kMaxima>;
  using Element = typename Engine::Element;
  using T = typename Engine::Acc;
  typename Traits::Params params{};
  params.anchors = {static_cast<const Element*>(args.anchors), args.num_anchors, args.stride};
  params.keys = {static_cast<const Element*>(args.keys), args.num_keys, args.stride};
  params.anchor_labels = make_labels(args.anchor_labels, args.num_anchors, args.views, args.ignore_index);
  params.key_labels = make_labels(args.key_labels, args.num_keys, args.key_views, args.ignore_index);
  params.scale = {static_cast<const T*>(args.temperature_ptr), T(1 / args.temperature)};
  params.beta = T(args.beta);
  params.symmetric = args.symmetric;
  params.has_self = args.has_self;
  params.self_offset = args.self_offset;
  params.groups = int(plan.groups);
  params.slots = static_cast<T*>(slots);
  params.ticket = ticket;
  const Grid grid = args.symmetric ? Grid{uint32_t(triangle(plan.groups))}
                                   : Grid{uint32_t(plan.row_tiles), uint32_t(plan.groups)};
  launch(forward_kernel<Traits>, "forward_kernel", grid, Traits::kThreads, Traits::kSharedBytes, stream,
         params);
}

template <class Engine, class Shape>
void forward_of_shape(const ContrastArgs& args, const ForwardPlan& plan, void* slots, uint32_t* ticket,
                      void* stream) {
  if (args.bounded) {
    launch_forward<Engine, Shape, false>(args, plan, slots, ticket, stream);
  } else {
    launch_forward<Engine, Shape, true>(args, plan, slots, ticket, stream);
  }
}

template <class Engine>
void forward_tiles(const ContrastArgs& args, const ForwardPlan& plan, void* slots, uint32_t* ticket,
                   void* stream) {
  if (plan.large_tiles) {
    forward_of_shape<Engine, typename Shapes<Engine>::ForwardLarge>(args, plan, slots, ticket, stream);
  } else {
    forward_of_shape<Engine, typename Shapes<Engine>::ForwardSmall>(args, plan, slots, ticket, stream);
  }
}

#define CLCE_INSTANTIATE_FORWARD(Engine)                          \
  template ForwardPlan plan_forward<Engine>(const ContrastArgs&); \
  template void forward_tiles<Engine>(const ContrastArgs&, const ForwardPlan&, void*, uint32_t*, void*);

}  // namespace clce::cuda
