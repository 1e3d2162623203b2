// A ring of places in shared memory: while one is read, asynchronous copies fill the others.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

// kStages - 1 steps are on their way at once. Steps says what they are, to all threads of the block alike:
// steps.left(), whether there is another one to load; steps.load(place), which starts its copies.
template <int kStages, int kStageBytes>
class Pipeline {
 public:
  static constexpr int kPlaces = kStages, kBytes = kStages * kStageBytes;

  CLCE_DEVICE explicit Pipeline(unsigned char* memory) : memory_(memory) {}

  template <class Steps>
  CLCE_DEVICE void start(Steps& steps) {
    for (int stage = 0; stage < kStages - 1; ++stage) load_into(stage * kStageBytes, steps);
  }

  // The next step's data, for all threads. Starts a load into the place of the step before, which nobody may
  // read any more.
  template <class Steps>
  CLCE_DEVICE unsigned char* next(Steps& steps) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync_threads();
    load_into(read_, steps);
    read_ = next_;
    next_ = next_ == kBytes - kStageBytes ? 0 : next_ + kStageBytes;
    ptx::count_step(read_ / kStageBytes);
    return memory_ + read_;
  }

  // No copy is left on its way.
  CLCE_DEVICE void finish() { ptx::cp_async_wait<0>(); }

 private:
  // Steps that are not there count as copies too: how many are on their way is always the same.
  template <class Steps>
  CLCE_DEVICE void load_into(int place, Steps& steps) {
    if (steps.left()) steps.load(memory_ + place);
    ptx::cp_async_commit();
  }

  unsigned char* const memory_;
  // The place that was read last, and that which is read next, in bytes from the first.
  int read_ = kBytes - kStageBytes, next_ = 0;
};

}  // namespace clce::cuda
