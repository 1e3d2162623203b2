// A ring of places in shared memory: while one is read, asynchronous copies fill the others.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

// kStages - 1 steps are on their way at once. Steps says what they are, to all threads of the block alike:
// steps.left(), whether there is another one to load; steps.load(place), which starts its copies.
template <int kStages, int kStageBytes>
class Pipeline {
 public:
  static constexpr int kBytes = kStages * kStageBytes;

  CLCE_DEVICE explicit Pipeline(unsigned char* memory) : memory_(memory) {}

  template <class Steps>
  CLCE_DEVICE void start(Steps& steps) {
    for (int stage = 0; stage < kStages - 1; ++stage) load_into(stage, steps);
  }

  // The next step's data, for all threads. Starts a load into the place of the step before, which nobody may
  // read any more.
  template <class Steps>
  CLCE_DEVICE unsigned char* next(Steps& steps) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync_threads();
    load_into(stage_ == 0 ? kStages - 1 : stage_ - 1, steps);
    ptx::count_step(stage_);
    unsigned char* const ready = place(stage_);
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    return ready;
  }

  // No copy is left on its way.
  CLCE_DEVICE void finish() { ptx::cp_async_wait<0>(); }

 private:
  CLCE_DEVICE unsigned char* place(int stage) const { return memory_ + stage * kStageBytes; }

  // Steps that are not there count as copies too: how many are on their way is always the same.
  template <class Steps>
  CLCE_DEVICE void load_into(int stage, Steps& steps) {
    if (steps.left()) steps.load(place(stage));
    ptx::cp_async_commit();
  }

  unsigned char* const memory_;
  int stage_ = 0;  // that is read next
};

}  // namespace clce::cuda
