#include "executor/clocks.h"

#include <algorithm>

#include "executor/fault.h"
#include "executor/thread.h"

namespace clce::executor {

namespace {

using AcquiredPointer = std::shared_ptr<const Acquired>;

AcquiredPointer unite(const AcquiredPointer& a, const AcquiredPointer& b) {
  if (b == nullptr || a == b) return a;
  if (a == nullptr) return b;
  auto both = std::make_shared<Acquired>(*a);
  for (const auto& [address, releases] : *b) (*both)[address] = std::max((*both)[address], releases);
  return both;
}

}  // namespace

void Clocks::start_block(Thread* threads, int num_threads) {
  num_threads_ = num_threads;
  free_snapshots_.clear();
  for (auto& snapshot : snapshots_) free_snapshots_.push_back(snapshot.get());
  Snapshot* nothing = new_snapshot();
  std::fill_n(nothing->clock, num_threads, 0u);
  nothing->references = num_threads;
  for (int i = 0; i < num_threads; ++i) {
    threads[i].clock = ThreadClock{};
    threads[i].clock.seen = nothing;
  }
}

Snapshot* Clocks::new_snapshot() {
  if (free_snapshots_.empty()) {
    snapshots_.push_back(std::make_unique<Snapshot>());
    return snapshots_.back().get();
  }
  Snapshot* snapshot = free_snapshots_.back();
  free_snapshots_.pop_back();
  return snapshot;
}

void Clocks::release(Snapshot* snapshot) {
  if (--snapshot->references == 0) free_snapshots_.push_back(snapshot);
}

void Clocks::advance(Thread& t) {
  if (++t.clock.now > kMaxClock) fail(t, Fault::kLaunch, "more barriers than the executor can count");
}

void Clocks::join(Thread* threads, int count) {
  Snapshot* all = new_snapshot();
  std::copy_n(threads[0].clock.seen->clock, num_threads_, all->clock);
  threads[0].clock.seen->visit = ++visit_;
  AcquiredPointer acquired;
  for (int i = 0; i < count; ++i) {
    Snapshot* seen = threads[i].clock.seen;
    if (seen->visit != visit_) {
      for (int t = 0; t < num_threads_; ++t) all->clock[t] = std::max(all->clock[t], seen->clock[t]);
      seen->visit = visit_;
    }
    acquired = unite(acquired, threads[i].clock.acquired);
  }
  all->references = count;
  for (int i = 0; i < count; ++i) {
    Thread& t = threads[i];
    all->clock[t.id] = std::max(all->clock[t.id], t.clock.now);
    release(t.clock.seen);
    t.clock.seen = all;
    t.clock.acquired = acquired;
    advance(t);
  }
}

void Clocks::fence(Thread& t) {
  const uint32_t* seen = t.clock.seen->clock;
  t.clock.fenced = std::make_shared<Release>(
      Release{t.block->number, t.id, t.clock.now, std::vector<uint32_t>(seen, seen + num_threads_)});
  advance(t);  // what comes after the fence is not released by it
  if (!t.clock.atomics.empty()) {
    t.clock.acquired = unite(t.clock.acquired, std::make_shared<const Acquired>(t.clock.atomics));
  }
}

void Clocks::atomic(Thread& t, uintptr_t address) {
  auto& releases = releases_[address];
  if (!releases.empty()) t.clock.atomics[address] = releases.size();
  if (t.clock.fenced) releases.push_back(t.clock.fenced);
}

bool Clocks::is_acquired(const Thread& t, uint32_t block, int thread, uint32_t then) const {
  if (t.clock.acquired == nullptr) return false;
  for (const auto& [address, count] : *t.clock.acquired) {
    const auto& releases = releases_.at(address);
    for (size_t i = 0; i < count; ++i) {
      const Release& release = *releases[i];
      if (release.block != block) continue;
      if (then <= (release.thread == thread ? release.clock : release.seen[thread])) return true;
    }
  }
  return false;
}

}  // namespace clce::executor
