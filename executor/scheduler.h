// Which thread of a block runs next. Threads are fibers: each runs until it has to wait for others. Barriers
// of a whole block are here; warp.h has what a warp's lanes do together.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "executor/call_site.h"
#include "executor/clocks.h"
#include "executor/executor.h"
#include "executor/fault.h"
#include "executor/thread.h"

namespace clce::executor {

class Scheduler {
 public:
  explicit Scheduler(Clocks& clocks);

  void set_order(Order order, uint64_t seed);

  // Returns in which order the launch's blocks run.
  std::vector<uint32_t> start_launch(uint32_t num_blocks);

  // Runs body(context) once per thread of the block; throws the first fault.
  void run(const Block& block, void (*body)(void*), void* context);

  Thread* threads() { return threads_.data(); }
  bool is_running() const { return running_ != nullptr; }
  Thread& running() { return *running_; }
  Thread* lanes_of(const Thread& t) { return &threads_[t.warp() * kWarpLanes]; }

  // Called on t's fiber.
  void barrier(Thread& t, const Operation& at);
  void wait(Thread& t, const Operation& at, bool for_warp);
  // Threads, of which t is one, have no longer to wait for one another.
  void release(const Thread& t, const Thread* first, int count);

 private:
  static void entry();
  void make_ready(const Thread& t) { ready_[t.warp()] |= 1u << t.lane(); }
  Thread* next();
  void go_on(Thread& from, bool ends);
  Error deadlock() const;
  std::string waiting_threads() const;

  Clocks& clocks_;
  Order order_ = Order::kAscending;
  uint64_t seed_ = 0;
  std::mt19937_64 random_;

  Fiber host_;
  std::vector<Thread> threads_{kMaxThreads};
  int num_threads_ = 0;
  int alive_ = 0;              // threads that have not ended
  int at_barrier_ = 0;         // threads
  Operation barrier_;          // of theirs
  uint32_t ready_[kMaxWarps];  // lanes that could run
  int current_warp_ = 0;
  Thread* running_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  std::unique_ptr<Error> error_;
};

}  // namespace clce::executor
