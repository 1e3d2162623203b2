// What one call does: which engine, which of its tiles, how the work is cut into blocks, and what lies where
// in the workspace. Made once per call, and a function of its arguments and of the kind of device: bits do
// not depend on what else the device does.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/grid.h"
#include "cuda/plan/tiles.h"

namespace clce::cuda {

struct ForwardPlan {
  Engine engine;
  bool panels;       // by panels: the shape counts; else by fused tiles: tile and grid do
  PanelShape shape;  // of the largest panel
  int tile;          // which of EngineTiles::forward
  // Slots of partial sums. Tiles: groups of rows in self-contrast, else splits of the columns; 0: no pairs.
  // Panels: one for each column of a panel's tiles, then, in self-contrast, one for each row of them.
  int64_t groups;
  Grid grid;             // of the pass over tiles
  Grid whole_grid;       // of the whole pass in one launch, where rows are not prepared yet; x is 0: never
  int64_t merge_blocks;  // of the merge that follows
  // What lies where in the workspace: the merge's ticket at 0, the sums of its blocks, the slots, the panel.
  size_t block_sums_at, slots_at, panel_at, workspace_bytes;
};

// The gradient of the rows of one side, the owner, from all rows of the other.
struct GradientPlan {
  int64_t row_tiles;  // of the owner
  int64_t splits;     // blocks that share the other side; if several, their shares lie in the workspace
  size_t shares_at;   // in the workspace
};

struct BackwardPlan {
  Engine engine;
  bool panels;       // by panels: the shape counts; else by fused tiles: what follows it does
  PanelShape shape;  // of the largest panel
  int tile;          // which of EngineTiles::backward
  int64_t chunks;    // of a row of the gradient
  // One launch makes both: for each chunk it has row_tiles x splits blocks of each side whose gradient is
  // wanted. Self-contrast: only the anchors'.
  GradientPlan anchors, keys;
  // float16: whether a launch of its own finds the unit, and where in the workspace it lies.
  bool finds_unit;
  size_t unit_at;
  // Panels: the factors of the gradient lie at 0 in the workspace, then the panel of logits, then that of
  // dL/ds, which is the same place where they are numbers of the same type.
  size_t panel_at, gradients_at, workspace_bytes;
};

ForwardPlan plan_forward(const ContrastArgs&, const Device&);
BackwardPlan plan_backward(const ContrastArgs&, const Device&);

}  // namespace clce::cuda
