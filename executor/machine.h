// The GPU: its parts, and what runs on it, one block of a launch after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "executor/async_copy.h"
#include "executor/banks.h"
#include "executor/clocks.h"
#include "executor/coverage.h"
#include "executor/executor.h"
#include "executor/global_memory.h"
#include "executor/scheduler.h"
#include "executor/shared_memory.h"
#include "executor/warp.h"

namespace clce::executor {

class Machine {
 public:
  Machine();
  void run(const Launch& launch, const void* kernel, const std::vector<Body>& phases, void* context);

  Clocks clocks;
  Scheduler scheduler{clocks};
  Warps warps{scheduler};
  SharedMemory shared;
  GlobalMemory global{clocks};
  AsyncCopies copies{shared, global};

  Coverage coverage;
  Banks banks;

  Arithmetic arithmetic = Arithmetic::kNearest;
  int compute_capability = 80, blocks_at_once = 216;
  std::vector<Launch> launches;
  bool recording_only = false;
};

// There is one; it outlives every static GlobalBuffer.
inline Machine& machine() {
  static Machine& the_machine = *new Machine;
  return the_machine;
}

// The thread whose code is running.
inline Thread& thread() {
  return machine().scheduler.running();
}
// Its warp.
inline Thread* lanes() {
  return machine().scheduler.lanes_of(thread());
}

}  // namespace clce::executor
