// What one call does: which engine, which of its tiles, how the work is cut into blocks, and what lies where
// in the workspace. Made once per call, and a function of its arguments alone: bits do not depend on what
// else the device is or does.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/grid.h"
#include "cuda/plan/tiles.h"

namespace clce::cuda {

// Threads of a block of the merge, whose sums of losses lie in the workspace.
constexpr int kMergeThreads = 128;

struct ForwardPlan {
  Engine engine;
  int tile;  // which of EngineTiles::forward
  // Groups of rows in self-contrast, else splits of the columns: so many slots of partial sums. 0: no pairs.
  int64_t groups;
  Grid grid;             // of the pass over tiles
  int64_t merge_blocks;  // of the merge that follows
  // What lies where in the workspace: the merge's ticket at 0, the sums of its blocks, the slots.
  size_t block_sums_at, slots_at, workspace_bytes;
};

// The gradient of the rows of one side, the owner, from all rows of the other.
struct GradientPlan {
  Engine engine;
  bool owner_is_keys;
  int tile;        // which of EngineTiles::backward
  int64_t splits;  // blocks that share the other side; if several, their shares lie in the workspace
  Grid grid;
  size_t workspace_bytes;
};

struct BackwardPlan {
  GradientPlan anchors, keys;  // self-contrast: only the anchors'
  size_t workspace_bytes;
};

ForwardPlan plan_forward(const ContrastArgs&, Architecture);
BackwardPlan plan_backward(const ContrastArgs&, Architecture);

}  // namespace clce::cuda
