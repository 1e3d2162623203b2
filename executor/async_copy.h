// cp.async: the bytes change at the wait, and belong to nobody until then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace clce::executor {

struct Thread;
class GlobalMemory;
class SharedMemory;

struct AsyncCopy {
  size_t shared_offset;
  size_t bytes;
  const void* global;  // null: zeros
};

// A thread's copies under way: groups, the oldest first, and what was not committed to a group yet.
struct ThreadCopies {
  std::deque<std::vector<AsyncCopy>> groups;
  std::vector<AsyncCopy> uncommitted;

  void clear() {
    groups.clear();
    uncommitted.clear();
  }
};

class AsyncCopies {
 public:
  AsyncCopies(SharedMemory& shared, GlobalMemory& global) : shared_(shared), global_(global) {}

  void start(Thread& t, void* shared, const void* global, size_t bytes, bool valid);
  void commit(Thread& t);
  void wait(Thread& t, int pending_groups);

 private:
  SharedMemory& shared_;
  GlobalMemory& global_;
};

}  // namespace clce::executor
