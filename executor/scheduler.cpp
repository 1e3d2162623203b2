#include "executor/scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <numeric>

namespace clce::executor {

namespace {
Scheduler* active = nullptr;  // for the fibers' entry function, which has no argument
}

Scheduler::Scheduler(Clocks& clocks) : clocks_(clocks) {
  for (int i = 0; i < kMaxThreads; ++i) threads_[i].id = i;
}

void Scheduler::set_order(Order order, uint64_t seed) {
  order_ = order;
  seed_ = seed;
}

std::vector<uint32_t> Scheduler::start_launch(uint32_t num_blocks) {
  random_.seed(seed_);
  std::vector<uint32_t> blocks(num_blocks);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (order_ == Order::kDescending) std::reverse(blocks.begin(), blocks.end());
  if (order_ == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random_);
  return blocks;
}

void Scheduler::run(const Block& block, void (*body)(void*), void* context) {
  active = this;
  body_ = body;
  context_ = context;
  num_threads_ = alive_ = block.num_threads;
  at_barrier_ = 0;
  error_.reset();
  std::fill_n(ready_, kMaxWarps, 0u);
  for (int i = 0; i < num_threads_; ++i) {
    Thread& t = threads_[i];
    t.block = &block;
    t.index = Dim3(i % block.dim.x, i / block.dim.x % block.dim.y, i / block.dim.x / block.dim.y);
    t.waits_at = {};
    t.meetings = 0;
    t.copies.clear();
    t.fiber.prepare(entry);
    make_ready(t);
  }
  current_warp_ = order_ == Order::kDescending ? threads_[num_threads_ - 1].warp() : 0;
  running_ = next();
  Fiber::switch_to(host_, running_->fiber);
  running_ = nullptr;
  if (error_) throw Error(*error_);
}

void Scheduler::entry() {
  Scheduler& s = *active;
  Thread& t = *s.running_;
  Fiber::entered(t.fiber);
  try {
    s.body_(s.context_);
  } catch (const Error& error) {
    s.error_ = std::make_unique<Error>(error);
  } catch (const std::exception& error) {
    s.error_ = std::make_unique<Error>(Fault::kLaunch, where(t) + ": " + error.what());
  }
  --s.alive_;
  s.go_on(t, true);
  std::abort();  // never resumed
}

// A warp runs as long as one of its lanes can, then the next one; at random, any of them.
Thread* Scheduler::next() {
  const int num_warps = (num_threads_ + kWarpLanes - 1) / kWarpLanes;
  int w = current_warp_;
  if (order_ == Order::kRandom) {
    const uint64_t draw = random_();
    if (ready_[w] == 0 || (draw & 7) == 0) w = static_cast<int>((draw >> 8) % num_warps);
  }
  const int step = order_ == Order::kDescending ? num_warps - 1 : 1;
  for (int tried = 0; ready_[w] == 0; ++tried) {
    if (tried == num_warps) return nullptr;
    w = (w + step) % num_warps;
  }
  current_warp_ = w;
  const uint32_t ready = ready_[w];
  int lane = 0;
  if (order_ == Order::kAscending) {
    lane = __builtin_ctz(ready);
  } else if (order_ == Order::kDescending) {
    lane = 31 - __builtin_clz(ready);
  } else {
    const int start = static_cast<int>(random_() % kWarpLanes);
    const uint32_t turned = start == 0 ? ready : (ready >> start | ready << (kWarpLanes - start));
    lane = (__builtin_ctz(turned) + start) % kWarpLanes;
  }
  ready_[w] &= ~(1u << lane);
  return &threads_[w * kWarpLanes + lane];
}

void Scheduler::go_on(Thread& from, bool ends) {
  Thread* to = error_ ? nullptr : next();
  if (to == &from) return;
  if (to == nullptr) {
    if (!error_ && alive_ > 0) error_ = std::make_unique<Error>(deadlock());
    Fiber::switch_to(from.fiber, host_, ends);
  } else {
    running_ = to;
    Fiber::switch_to(from.fiber, to->fiber, ends);
  }
}

void Scheduler::wait(Thread& t, const Operation& at, bool for_warp) {
  t.waits_at = at;
  t.waits_for_warp = for_warp;
  go_on(t, false);
  t.waits_at = {};
}

void Scheduler::barrier(Thread& t, const Operation& at) {
  ++t.meetings;
  if (at_barrier_ == 0) {
    barrier_ = at;
  } else if (at != barrier_) {
    fail(t, Fault::kBarrier, "this thread is at " + at.text() + ", others at " + barrier_.text());
  }
  if (++at_barrier_ < num_threads_) {
    wait(t, at, false);
    return;
  }
  at_barrier_ = 0;
  clocks_.join(threads(), num_threads_);
  release(t, threads(), num_threads_);
}

void Scheduler::release(const Thread& t, const Thread* first, int count) {
  for (int i = 0; i < count; ++i) {
    if (&first[i] != &t) make_ready(first[i]);
  }
}

Error Scheduler::deadlock() const {
  const Thread* waiting = nullptr;
  for (int i = 0; i < num_threads_; ++i) {
    const Thread& t = threads_[i];
    if (t.waits_at.what == nullptr) continue;
    if (waiting == nullptr || (t.waits_for_warp && !waiting->waits_for_warp)) waiting = &t;
  }
  return error_in(*waiting, waiting->waits_for_warp ? Fault::kDivergence : Fault::kBarrier,
                  "no thread can go on: " + waiting_threads());
}

// Ranges of threads by what they are waiting for.
std::string Scheduler::waiting_threads() const {
  std::string text;
  for (int first = 0, last; first < num_threads_; first = last + 1) {
    const Operation& at = threads_[first].waits_at;
    last = first;
    while (last + 1 < num_threads_ && threads_[last + 1].waits_at == at) ++last;
    const bool several = last > first;
    if (!text.empty()) text += "; ";
    text += several ? "threads " + std::to_string(first) + " to " + std::to_string(last)
                    : "thread " + std::to_string(first);
    text += at.what == nullptr ? " ended" : (several ? " wait at " : " waits at ") + at.text();
  }
  return text;
}

}  // namespace clce::executor
