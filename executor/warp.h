// What the 32 lanes of a warp do together: shuffles, votes, matrices.
#pragma once

#include <cstdint>

#include "executor/clocks.h"
#include "executor/scheduler.h"

namespace clce::executor {

// Computes what the lanes receive from what they bring.
using Evaluate = void (*)(const void* const* in, void* const* out);

class Warps {
 public:
  explicit Warps(Scheduler& scheduler) : scheduler_(scheduler) {}

  void start_block();

  // All lanes of t's warp meet here; the last one calls evaluate(in, out) with the lanes' pointers. Every
  // lane must come from the same operation.
  void collective(Thread& t, const Operation& at, Evaluate evaluate, const void* in, void* out);

 private:
  struct Meeting {
    uint32_t arrived = 0;  // lanes
    Operation at;
    const void* in[kWarpLanes];
    void* out[kWarpLanes];
  };

  Scheduler& scheduler_;
  Meeting meetings_[kMaxWarps];
};

}  // namespace clce::executor
