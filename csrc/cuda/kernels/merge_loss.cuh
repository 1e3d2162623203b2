// From scratch slots to statistics, and from statistics to the loss and its derivatives.
#pragma once

#include "cuda/kernels/block_reduce.cuh"
#include "cuda/kernels/logits.cuh"
#include "cuda/kernels/partial_sums.cuh"
#include "family/loss.h"

namespace clce::cuda {

// The most threads of a block, which a single one has: 65536 registers give 64 to each of 1024 threads.
// float32 needs 56 of them, float64 about 96.
template <class T>
constexpr int kLossThreads = sizeof(T) == 8 ? 512 : 1024;

template <class T>
struct MergeLossParams {
  int64_t rows;
  bool merge;  // slots -> statistics; else the statistics are there
  const T* slots;
  int64_t num_slots;
  bool unbounded;  // unless scale.decides
  T beta;
  T* statistics;
  bool with_loss;
  LossConfig config;
  const T* debias;  // [rows], instead of the config's; or null
  Scale<T> scale;
  bool each_row, mean;  // reduction none; mean
  T* loss;
  T* num_terms;
  T* derivatives;
  // [2 * blocks] sums of blocks, and the count of blocks that are done; not used by a single block.
  T* block_sums;
  uint32_t* ticket;
};

template <class T>
struct LossSum {
  T loss, terms;
};

template <class T>
CLCE_DEVICE LossSum<T> block_sum(const LossSum<T>& mine) {
  T sums[2] = {mine.loss, mine.terms};
  block_reduce(sums, reinterpret_cast<T*>(ptx::dynamic_shared()), int(blockDim.x) / 32, Add{});
  return {sums[0], sums[1]};
}

template <class T>
CLCE_DEVICE Statistics<T> statistics_of_row(const MergeLossParams<T>& p, int64_t row, bool unbounded) {
  const auto at = [&](int field) { return p.statistics + field * p.rows + row; };
  if (!p.merge) return statistics_from<T>([&](int field) { return ptx::global_load(at(field)); });
  const int fields = num_fields(unbounded);
  PartialSums<T> sums;
  for (int64_t i = 0; i < p.num_slots; ++i) {
    const T* const slot = p.slots + i * fields * p.rows + row;
    combine(sums, load_partial_sums(slot, p.rows, unbounded), unbounded, p.beta);
  }
  const Statistics<T> result = finalize(sums, hardness(p.beta));
  put_statistics(result, [&](int field, T value) { ptx::global_store(at(field), value); });
  return result;
}

template <class T>
CLCE_DEVICE void store_loss(const MergeLossParams<T>& p, const LossSum<T>& sum) {
  ptx::global_store(p.num_terms, sum.terms);
  if (p.each_row) return;
  const T count = sum.terms > 1 ? sum.terms : T(1);
  ptx::global_store(p.loss, p.mean ? sum.loss / count : sum.loss);
}

template <class T>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(kLossThreads<T>, 1) merge_loss_kernel(MergeLossParams<T> p) {
  const T scale = load_scale(p.scale);
  const bool unbounded = logits_are_unbounded(p.scale, p.beta, p.unbounded);
  LossConfig config = p.config;
  LossSum<T> mine{0, 0};
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < p.rows; row += step) {
    const Statistics<T> statistics = statistics_of_row(p, row, unbounded);
    if (!p.with_loss) continue;
    if (p.debias) config.debias = ptx::global_load(p.debias + row);
    const AnchorLoss<T> anchor = anchor_loss(statistics, config, scale);
    put_derivatives(anchor.d, [&](int field, T value) {
      ptx::global_store(p.derivatives + field * p.rows + row, value);
    });
    if (p.each_row) ptx::global_store(p.loss + row, anchor.value);
    mine.loss += anchor.value;
    mine.terms += T(anchor.is_term);
  }
  if (!p.with_loss) return;
  const LossSum<T> block = block_sum(mine);
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) store_loss(p, block);
    return;
  }

  // The block that is last to come here adds up all of them, in their order.
  uint32_t* const last = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  ptx::sync_threads();
  if (threadIdx.x == 0) {
    ptx::global_store(p.block_sums + 2 * int64_t(blockIdx.x), block.loss);
    ptx::global_store(p.block_sums + 2 * int64_t(blockIdx.x) + 1, block.terms);
    ptx::fence_device();
    ptx::shared_store(last, uint32_t(ptx::atomic_add(p.ticket, 1u) == gridDim.x - 1));
    ptx::fence_device();
  }
  ptx::sync_threads();
  if (!ptx::shared_load(last)) return;
  LossSum<T> all{0, 0};
  for (int64_t i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    all.loss += ptx::global_load(p.block_sums + 2 * i);
    all.terms += ptx::global_load(p.block_sums + 2 * i + 1);
  }
  all = block_sum(all);
  if (threadIdx.x == 0) store_loss(p, all);
}

}  // namespace clce::cuda
