// From scratch slots to statistics, and from statistics to the loss and its derivatives.
#pragma once

#include "cuda/grid.h"
#include "cuda/kernels/block_reduce.cuh"
#include "cuda/kernels/logits.cuh"
#include "cuda/kernels/partial_sums.cuh"
#include "family/loss.h"

namespace clce::cuda {

// The threads of the one block that makes a loss of statistics: 65536 registers give 64 to each of 1024.
template <class T>
constexpr int kLossThreads = sizeof(T) == 8 ? 512 : 1024;

template <class T>
struct MergeLossParams {
  int64_t rows;
  const T* slots;  // [num_slots][fields][rows]
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

// Partial sums of several slots. Their counts are added up as integers: float32 has not all of them beyond
// 2^24, and no slot has so many (plan.cpp).
template <class T>
struct MergedSums {
  PartialSums<T> sums;
  uint32_t n_pos = 0, n_neg = 0;

  CLCE_DEVICE void add(const PartialSums<T>& slot, bool unbounded, T beta) {
    combine(sums, slot, unbounded, beta);
    n_pos += uint32_t(slot.n_pos);
    n_neg += uint32_t(slot.n_neg);
  }
  CLCE_DEVICE void add(const MergedSums& other, bool unbounded, T beta) {
    combine(sums, other.sums, unbounded, beta);
    n_pos += other.n_pos;
    n_neg += other.n_neg;
  }
  CLCE_DEVICE PartialSums<T> rounded_once(bool unbounded, T beta) const {
    PartialSums<T> result = sums;
    result.n_pos = T(n_pos);
    result.n_neg = T(n_neg);
    if (!unbounded && beta == 0) result.exp_w = result.n_neg;
    return result;
  }
};

// Bytes of shared memory of a block of the merge: what its threads hand to the first kMergeRows of them, and
// then a loss and a count per warp.
template <class T>
constexpr int kMergeBytes = (kMergeThreads - kMergeRows) * int(sizeof(MergedSums<T>));

template <class T>
struct LossSum {
  T loss = 0, terms = 0;
};

template <class T>
CLCE_DEVICE LossSum<T> block_sum(const LossSum<T>& mine) {
  T sums[2] = {mine.loss, mine.terms};
  block_reduce(sums, reinterpret_cast<T*>(ptx::dynamic_shared()), int(blockDim.x) / 32, Add{});
  return {sums[0], sums[1]};
}

// Writes the row's loss and derivatives, and adds the loss to the sum.
template <class T>
CLCE_DEVICE void add_loss_of_row(const MergeLossParams<T>& p, int64_t row, const Statistics<T>& statistics,
                                 T scale, LossSum<T>& sum) {
  LossConfig config = p.config;
  if (p.debias) config.debias = ptx::global_load(p.debias + row);
  const AnchorLoss<T> anchor = anchor_loss(statistics, config, scale);
  put_derivatives(
      anchor.d, [&](int field, T value) { ptx::global_store(p.derivatives + field * p.rows + row, value); });
  if (p.each_row) ptx::global_store(p.loss + row, anchor.value);
  sum.loss += anchor.value;
  sum.terms += T(anchor.is_term);
}

template <class T>
CLCE_DEVICE void store_loss(const MergeLossParams<T>& p, const LossSum<T>& sum) {
  if (threadIdx.x != 0) return;
  ptx::global_store(p.num_terms, sum.terms);
  if (p.each_row) return;
  const T count = sum.terms > 1 ? sum.terms : T(1);
  ptx::global_store(p.loss, p.mean ? sum.loss / count : sum.loss);
}

// The sum over all blocks, by the block that is last to come here: of all of them, in their order.
template <class T>
CLCE_DEVICE void store_loss_of_blocks(const MergeLossParams<T>& p, const LossSum<T>& mine, int block,
                                      int blocks) {
  const LossSum<T> sum = block_sum(mine);
  if (blocks == 1) return store_loss(p, sum);
  uint32_t* const last = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  ptx::sync_threads();
  if (threadIdx.x == 0) {
    ptx::global_store(p.block_sums + 2 * int64_t(block), sum.loss);
    ptx::global_store(p.block_sums + 2 * int64_t(block) + 1, sum.terms);
    ptx::fence_device();
    ptx::shared_store(last, uint32_t(ptx::atomic_add(p.ticket, 1u) == uint32_t(blocks - 1)));
    ptx::fence_device();
  }
  ptx::sync_threads();
  if (!ptx::shared_load(last)) return;
  LossSum<T> all;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
    all.loss += ptx::global_load(p.block_sums + 2 * i);
    all.terms += ptx::global_load(p.block_sums + 2 * i + 1);
  }
  store_loss(p, block_sum(all));
}

// The work of one of `blocks` blocks: kMergeRows rows at a time, each by kMergeParts threads, which read its
// slots at the same time. Thread t has part t / kMergeRows of row t % kMergeRows.
template <class T>
CLCE_DEVICE void merge_loss(const MergeLossParams<T>& p, int block, int blocks) {
  const T scale = load_scale(p.scale);
  const bool unbounded = logits_are_unbounded(p.scale, p.beta, p.unbounded);
  const int fields = num_fields(unbounded), place = int(threadIdx.x) % kMergeRows;
  const int part = int(threadIdx.x) / kMergeRows;
  MergedSums<T>* const shares = reinterpret_cast<MergedSums<T>*>(ptx::dynamic_shared());
  LossSum<T> mine;
  for (int64_t first = int64_t(block) * kMergeRows; first < p.rows; first += int64_t(blocks) * kMergeRows) {
    const int64_t row = first + place;
    MergedSums<T> sums;
    if (row < p.rows) {
#pragma unroll 2
      for (int64_t i = part; i < p.num_slots; i += kMergeParts) {
        sums.add(load_partial_sums(p.slots + i * fields * p.rows + row, p.rows, unbounded), unbounded,
                 p.beta);
      }
    }
    if (part > 0) ptx::shared_store(shares + (part - 1) * kMergeRows + place, sums);
    ptx::sync_threads();
    if (part == 0 && row < p.rows) {
      for (int i = 0; i < kMergeParts - 1; ++i) {
        sums.add(ptx::shared_load(shares + i * kMergeRows + place), unbounded, p.beta);
      }
      const Statistics<T> statistics = finalize(sums.rounded_once(unbounded, p.beta), hardness(p.beta));
      put_statistics(statistics, [&](int field, T value) {
        ptx::global_store(p.statistics + field * p.rows + row, value);
      });
      if (p.with_loss) add_loss_of_row(p, row, statistics, scale, mine);
    }
    ptx::sync_threads();
  }
  if (p.with_loss) store_loss_of_blocks(p, mine, block, blocks);
}

template <class T>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(kMergeThreads, 1) merge_loss_kernel(MergeLossParams<T> p) {
  merge_loss(p, int(blockIdx.x), int(gridDim.x));
}

// The loss of statistics that are there; one block.
template <class T>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(kLossThreads<T>, 1) loss_kernel(MergeLossParams<T> p) {
  const T scale = load_scale(p.scale);
  LossSum<T> mine;
  for (int64_t row = threadIdx.x; row < p.rows; row += blockDim.x) {
    const Statistics<T> statistics =
        statistics_from<T>([&](int field) { return ptx::global_load(p.statistics + field * p.rows + row); });
    add_loss_of_row(p, row, statistics, scale, mine);
  }
  store_loss(p, block_sum(mine));
}

}  // namespace clce::cuda
