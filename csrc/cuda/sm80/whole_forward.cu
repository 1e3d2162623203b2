// The whole forward pass of small batches in one launch, for each format that anybody waits for.
#include "cuda/kernels/whole_forward.cuh"

#include "cuda/row_arguments.cuh"
#include "cuda/sm80/forward.cuh"

namespace clce::cuda::sm80 {

template <class First, class Second>
Second second_of(List<First, Second>);

template <Format format>
bool forward_whole(const ForwardArgs& args, const ForwardPlan& plan, void* stream) {
  using Shapes = sm80::Shapes<format>;
  using Product = typename Shapes::Product;
  using SmallShape = decltype(second_of(typename Shapes::Forward{}));
  using Whole = WholeForward<Product, SmallShape>;
  using Element = typename Product::Element;
  static_assert(shared_fits(Whole::kSharedBytes, 1), "every device since sm_80 can run it");
  static_assert(Whole::kMinBlocks * (Whole::kSharedBytes + Device::kReservedShared) <= 164 * 1024,
                "an A100 has room for the plan's kBlocksAtOnce");
  typename Whole::Params params{};
  params.rows =
      sides(prepare_params<Element>(args.prepare_anchors), prepare_params<Element>(args.prepare_keys));
  params.row_blocks = uint32_t(row_blocks(args.prepare_anchors.rows) + row_blocks(args.prepare_keys.rows));
  params.tiles = forward_params<typename Whole::Bounded>(args, plan);
  params.tile_grid = plan.grid;
  params.merge = merge_params<typename Whole::T>(args, plan);
  params.merge_blocks = int(plan.merge_blocks);
  return launch_phases<Whole>("whole_forward", plan.whole_grid, stream, params);
}

// float64 is for checking gradients.
template <>
bool forward_whole<Format::kFloat64>(const ForwardArgs&, const ForwardPlan&, void*) {
  return false;
}

template bool forward_whole<Format::kFloat32>(const ForwardArgs&, const ForwardPlan&, void*);
template bool forward_whole<Format::kTf32>(const ForwardArgs&, const ForwardPlan&, void*);
template bool forward_whole<Format::kBFloat16>(const ForwardArgs&, const ForwardPlan&, void*);
template bool forward_whole<Format::kFloat16>(const ForwardArgs&, const ForwardPlan&, void*);

}  // namespace clce::cuda::sm80
