// The backend's entry points: which engine, which workspace, in which order.
#include <type_traits>

#include "cuda/kernels/merge_loss.cuh"
#include "cuda/kernels/reduce.cuh"
#include "cuda/passes.h"
#include "cuda/tile/fma.cuh"
#include "cuda/tile/half.cuh"
#include "cuda/tile/tf32.cuh"

namespace clce::cuda {
namespace {

template <class Engine>
struct EngineTag {
  using Type = Engine;
};

// Calls use(EngineTag<Engine>) with the engine for the arguments.
template <class Use>
auto with_engine(const ContrastArgs& args, Use use) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return use(EngineTag<HalfEngine<ptx::bf16>>{});
    case DType::kFloat16:
      return use(EngineTag<HalfEngine<ptx::f16>>{});
    case DType::kFloat64:
      return use(EngineTag<FmaEngine<double>>{});
    default:
      break;
  }
  return args.allow_tf32 ? use(EngineTag<Tf32Engine>{}) : use(EngineTag<FmaEngine<float>>{});
}

// The kernels for bounded logits take the temperature from the host.
template <class Args>
Args with_known_bound(Args args) {
  if constexpr (std::is_same_v<Args, ContrastArgs>) {
    args.bounded = args.bounded && !args.temperature_ptr;
  } else {
    args.contrast = with_known_bound(args.contrast);
  }
  return args;
}

size_t acc_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

constexpr size_t kAlignment = 256;

size_t aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t merge_blocks(int64_t rows) {
  return ceil_div(rows, kMergeThreads);
}

// Workspace of forward: the ticket, the sums of the merge's blocks, the slots.
struct ForwardWorkspace {
  size_t block_sums, slots, bytes;
};

ForwardWorkspace forward_workspace(const ContrastArgs& args, const ForwardPlan& plan) {
  const size_t acc = acc_bytes(args.dtype);
  const size_t fields = num_fields(!args.bounded);
  ForwardWorkspace w{};
  w.block_sums = kAlignment;
  w.slots = w.block_sums + aligned(2 * acc * size_t(merge_blocks(args.num_anchors)));
  w.bytes = w.slots + aligned(acc * fields * size_t(plan.groups) * size_t(args.num_anchors));
  return w;
}

ForwardPlan plan_of(const ContrastArgs& args) {
  return with_engine(args, [&](auto tag) { return plan_forward<typename decltype(tag)::Type>(args); });
}

template <class T>
void fill_loss(MergeLossParams<T>& p, const LossArgs& args) {
  p.with_loss = true;
  p.config = args.config;
  p.scale = {static_cast<const T*>(args.temperature_ptr), T(1 / args.temperature)};
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
void merge_as(const ForwardArgs& args, const ForwardPlan& plan, bool any_keys, void* stream) {
  const ContrastArgs& c = args.contrast;
  const ForwardWorkspace w = forward_workspace(c, plan);
  unsigned char* const memory = static_cast<unsigned char*>(args.workspace);
  MergeLossParams<T> p{};
  p.rows = c.num_anchors;
  p.merge = true;
  p.slots = reinterpret_cast<const T*>(memory + w.slots);
  p.num_slots = any_keys ? plan.groups : 0;
  p.maxima = !c.bounded;
  p.beta = T(c.beta);
  p.statistics = static_cast<T*>(args.statistics);
  p.scale.value = 1;
  if (args.with_loss) fill_loss(p, args.loss);
  p.block_sums = reinterpret_cast<T*>(memory + w.block_sums);
  p.ticket = reinterpret_cast<uint32_t*>(memory);
  // The tile pass has set the ticket to 0; without one, a single block needs none.
  const int64_t blocks = any_keys ? merge_blocks(c.num_anchors) : 1;
  if (c.num_anchors == 0 && !args.with_loss) return;
  launch_merge_loss(p, blocks, kMergeThreads, stream);
}

template <class T>
void loss_as(const LossArgs& args, void* stream) {
  MergeLossParams<T> p{};
  p.rows = args.num_anchors;
  p.statistics = const_cast<T*>(static_cast<const T*>(args.statistics));
  fill_loss(p, args);
  launch_merge_loss(p, 1, kLossThreads<T>, stream);
}

BackwardPlan plan_of(const ContrastArgs& args, bool owner_is_keys) {
  return with_engine(
      args, [&](auto tag) { return plan_backward<typename decltype(tag)::Type>(args, owner_is_keys); });
}

size_t split_bytes(const ContrastArgs& args, bool owner_is_keys) {
  const BackwardPlan plan = plan_of(args, owner_is_keys);
  if (plan.splits == 1) return 0;
  const int64_t rows = owner_is_keys ? args.num_keys : args.num_anchors;
  return acc_bytes(args.dtype) * size_t(plan.splits) * size_t(rows) * size_t(args.stride);
}

template <class T>
void reduce_as(const void* shares, void* total, int64_t count, int64_t splits, void* stream) {
  const ReduceParams<T> p{static_cast<const T*>(shares), static_cast<T*>(total), count, splits};
  const int64_t per_block = kReduceThreads * int64_t(ptx::Pack<T>::kSize);
  launch(reduce_kernel<T>, "reduce_kernel", Grid{uint32_t(ceil_div(count, per_block))}, kReduceThreads, 0,
         stream, p);
}

void backward_of(const BackwardArgs& args, bool owner_is_keys, void* gradient, void* stream) {
  if (!gradient) return;
  const ContrastArgs& c = args.contrast;
  const int64_t rows = owner_is_keys ? c.num_keys : c.num_anchors;
  if (rows == 0) return;
  const BackwardPlan plan = plan_of(c, owner_is_keys);
  const bool split = plan.splits > 1;
  const GradientPass pass{owner_is_keys, split ? args.workspace : gradient, plan.splits};
  with_engine(c, [&](auto tag) { backward_tiles<typename decltype(tag)::Type>(args, pass, stream); });
  if (!split) return;
  if (c.dtype == DType::kFloat64) {
    reduce_as<double>(args.workspace, gradient, rows * c.stride, plan.splits, stream);
  } else {
    reduce_as<float>(args.workspace, gradient, rows * c.stride, plan.splits, stream);
  }
}

}  // namespace

size_t forward_workspace_bytes(const ContrastArgs& given) {
  const ContrastArgs args = with_known_bound(given);
  return forward_workspace(args, plan_of(args)).bytes;
}

void forward(const ForwardArgs& given, void* stream) {
  const ForwardArgs args = with_known_bound(given);
  const ContrastArgs& c = args.contrast;
  const ForwardPlan plan = plan_of(c);
  const bool any_pairs = c.num_anchors > 0 && c.num_keys > 0;
  if (any_pairs) {
    unsigned char* const memory = static_cast<unsigned char*>(args.workspace);
    void* const slots = memory + forward_workspace(c, plan).slots;
    with_engine(c, [&](auto tag) {
      forward_tiles<typename decltype(tag)::Type>(c, plan, slots, reinterpret_cast<uint32_t*>(memory),
                                                  stream);
    });
  }
  if (c.dtype == DType::kFloat64) {
    merge_as<double>(args, plan, any_pairs, stream);
  } else {
    merge_as<float>(args, plan, any_pairs, stream);
  }
}

void loss(const LossArgs& args, void* stream) {
  if (args.dtype == DType::kFloat64) {
    loss_as<double>(args, stream);
  } else {
    loss_as<float>(args, stream);
  }
}

size_t backward_workspace_bytes(const ContrastArgs& given) {
  const ContrastArgs args = with_known_bound(given);
  const size_t anchors = split_bytes(args, false);
  const size_t keys = args.symmetric ? 0 : split_bytes(args, true);
  return anchors > keys ? anchors : keys;
}

void backward(const BackwardArgs& given, void* stream) {
  const BackwardArgs args = with_known_bound(given);
  backward_of(args, false, args.danchors, stream);
  backward_of(args, true, args.dkeys, stream);
}

}  // namespace clce::cuda
