// How far the blocks of each kernel have walked: whether the tests have been where a kernel can go wrong.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace clce::executor {

// Of a block; or, of several, the most of each.
struct Walk {
  int64_t tiles = 0;
  int64_t steps = 0;                                   // of a tile
  int64_t several_step_tiles = 0;                      // tiles of two steps or more
  int64_t wraps = 0;                                   // how often the ring of the pipeline began again
  bool partial_rows = false, partial_columns = false;  // of a copy to shared memory: less than there is room
  int place_before = -1;                               // of the step before; -1: none

  void add_tile(int64_t tile_steps);
  void add_step(int place);
  void merge(const Walk& other);
};

// All launches of one kernel.
struct KernelRuns {
  int64_t blocks = 0;  // of the largest launch
  Walk walk;
};

// Kernels by their symbols, one for each instantiation. Where the environment variable CLCE_EXECUTOR_COVERAGE
// names a file, it is written when the process ends.
class Coverage {
 public:
  Coverage();

  void start_launch(const void* kernel, int64_t blocks);
  void start_block() { walk_ = {}; }
  void end_block() { current_->walk.merge(walk_); }
  Walk& walk() { return walk_; }

  // Of the kernel that was launched last.
  const KernelRuns& current() const { return *current_; }
  void forget() { kernels_.clear(); }
  void write() const;

 private:
  std::string path_;
  std::map<const void*, KernelRuns> kernels_;
  KernelRuns* current_ = nullptr;
  Walk walk_;
};

}  // namespace clce::executor
