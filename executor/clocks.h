// Happens-before, by vector clocks: which accesses of other threads a thread may rely on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace clce::executor {

struct Block;
struct Thread;

constexpr int kWarpLanes = 32;
constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxWarps = kMaxThreads / kWarpLanes;

// A thread's clock advances at every barrier and fence. Clocks and threads are parts of the stamps that
// remember who accessed a byte.
constexpr int kClockBits = 21, kThreadBits = 10;
constexpr uint32_t kMaxClock = (1u << kClockBits) - 1;
static_assert(1 << kThreadBits == kMaxThreads);

// What a thread has seen: for each thread of its block, the clock up to which that thread's accesses may be
// relied on. The participants of a barrier share one.
struct Snapshot {
  int references = 0;
  uint32_t visit = 0;  // scratch of Clocks::join
  uint32_t clock[kMaxThreads];
};

// A thread's fence and then its atomic let other blocks see what the thread had seen or done before the
// fence: those that come to the same atomic later, and then to a fence of their own.
struct Release {
  uint32_t block;
  int thread;
  uint32_t clock;              // of the thread
  std::vector<uint32_t> seen;  // clocks of its block's other threads
};
using Acquired = std::map<uintptr_t, size_t>;  // by the atomic's address: how many of its releases are seen

struct ThreadClock {
  uint32_t now = 1;
  Snapshot* seen = nullptr;
  std::shared_ptr<const Release> fenced;     // by the last fence; released by an atomic that follows it
  Acquired atomics;                          // met at an atomic, of use after the next fence
  std::shared_ptr<const Acquired> acquired;  // null: nothing
};

class Clocks {
 public:
  void start_launch() { releases_.clear(); }
  void start_block(Thread* threads, int num_threads);

  // Each of the threads has now seen what all of them did and had seen.
  void join(Thread* threads, int count);
  void fence(Thread& t);
  void atomic(Thread& t, uintptr_t address);

  // Whether fences and atomics make what a thread of another block did, while its clock was `then`, visible
  // to `t`.
  bool is_acquired(const Thread& t, uint32_t block, int thread, uint32_t then) const;

 private:
  void advance(Thread& t);
  Snapshot* new_snapshot();
  void release(Snapshot* snapshot);

  int num_threads_ = 0;
  uint32_t visit_ = 0;
  std::vector<std::unique_ptr<Snapshot>> snapshots_;
  std::vector<Snapshot*> free_snapshots_;
  std::map<uintptr_t, std::vector<std::shared_ptr<const Release>>> releases_;  // of this launch, by atomic
};

}  // namespace clce::executor
