// The block that runs, and one of its threads: its stack, what it waits for, what it has seen of the other
// threads' work and its asynchronous copies under way.
#pragma once

#include <cstdint>
#include <string>

#include "executor/async_copy.h"
#include "executor/call_site.h"
#include "executor/clocks.h"
#include "executor/dim3.h"
#include "executor/fiber.h"

namespace clce::executor {

struct Block {
  std::string kernel;
  Dim3 grid, dim, index;
  int num_threads = 0;
  uint32_t number = 0;  // within its launch
  uint32_t launch = 0;  // from 1
};

struct Thread {
  Fiber fiber;
  int id = 0;  // within its block
  const Block* block = nullptr;
  Dim3 index;
  Operation waits_at;           // of nothing: it runs, could run, or has ended
  bool waits_for_warp = false;  // else for the block
  uint32_t meetings = 0;        // warp-wide operations and barriers that it has come to
  ThreadClock clock;
  ThreadCopies copies;

  int warp() const { return id / kWarpLanes; }
  int lane() const { return id % kWarpLanes; }

  // Whether it may rely on what thread `other` of its block did while that one's clock was `then`.
  bool has_seen(int other, uint32_t then) const { return other == id || then <= clock.seen->clock[other]; }
};

}  // namespace clce::executor
