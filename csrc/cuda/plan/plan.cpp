#include "cuda/plan/plan.h"

#include <algorithm>

#include "dispatch.h"

namespace clce::cuda {
namespace {

// Of the largest devices, about. The same for every device, or bits would depend on it.
constexpr int64_t kMultiprocessors = 128;

constexpr size_t kAlignment = 256;

// A slot counts its keys in the accumulation type, and float32 has all numbers up to here.
constexpr int64_t kMostCounted = int64_t(1) << 24;

size_t aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t triangle(int64_t n) {
  return n * (n + 1) / 2;
}

Engine engine_for(const ContrastArgs& args, Architecture architecture) {
  const bool on_device = args.temperature_ptr != nullptr;
  return {architecture, format_of(args), args.bounded && !on_device, args.bounded && on_device};
}

// Whether products of the library beat the fused tiles.
bool choose_panels(const ContrastArgs& args, Format format) {
  if (!args.product.multiply || args.num_anchors == 0 || args.num_keys == 0) return false;
  if (args.num_keys > kMostCounted) return false;  // a slot may have all of them
  if (args.engine != EngineChoice::kAuto) return args.engine == EngineChoice::kPanels;
  // Up to this width a block of the backward pass holds whole rows of the gradient, and in 16 bits its own
  // rows in shared memory too. Wider 16-bit tiles wait for L2, and the other formats compute the logits again
  // for each chunk of the row, while a panel is gone over as often for any width. At 256 columns of bfloat16
  // the GPU would be done with a panel before the host has launched the next one; from 512 on panels are
  // predicted to be twice as fast as tiles (docs/cuda.md, docs/performance.md).
  const int64_t widest = format == Format::kFloat64 ? 64 : 256;
  // Fewer pairs are few panels, whose six launches each take the host longer than the tiles take the GPU.
  constexpr int64_t kFewestPairs = int64_t(1) << 24;
  return args.stride > widest && args.num_anchors * args.num_keys >= kFewestPairs;
}

// 16 MiB of logits, and 8 of dL/ds in 16 bits, stay in the L2 cache of an A100 (40 MB) or H100 (50 MB) while
// the kernels go over them. Many rows, as they are what the product with the columns' embeddings adds to;
// still enough columns for it to sum over.
PanelShape panel_shape(const ContrastArgs& args) {
  const bool wide = args.dtype == DType::kFloat64;
  const int64_t rows = args.panel_rows > 0 ? args.panel_rows : wide ? 2048 : 4096;
  const int64_t columns = args.panel_columns > 0 ? args.panel_columns : 1024;
  // Rows of a panel begin at multiples of 16 bytes, in any format.
  constexpr int64_t kColumns = 8;
  return {std::min(rows, args.num_anchors),
          std::min(columns + kColumns - 1, args.num_keys + kColumns - 1) / kColumns * kColumns};
}

// The large tile where there are enough of it, for it reads less; unless the device has so little shared
// memory that more warps of the small one run at once.
int choose_forward_tile(const ContrastArgs& args, const EngineTiles& tiles, const Device& device) {
  if (args.forward_tile >= 0) return args.forward_tile;
  const auto warps = [&](const ForwardBlock& block) {
    return block.warps * std::min(block.blocks, device.blocks_at_once(block.shared_kib * 1024));
  };
  if (warps(tiles.forward_block[0]) < warps(tiles.forward_block[1])) return 1;
  const int64_t rows = ceil_div(args.num_anchors, tiles.forward[0]);
  const int64_t columns = ceil_div(args.num_keys, tiles.forward[0]);
  return (args.symmetric ? triangle(rows) : rows * columns) >= kMultiprocessors ? 0 : 1;
}

// The forward pass in one launch. Its blocks meet, so they must all be on the device at once: the small tile
// lets two of them onto a multiprocessor, and an A100 has 108. A device with fewer takes the launches one by
// one, and makes the same bits. Up to kWholeRows rows on a side a launch takes the host (2 to 3 us) about as
// long as a phase takes the GPU; beyond them the blocks that meet would prepare many rows each, one after the
// other.
constexpr int64_t kBlocksAtOnce = 2 * 108, kWholeRows = 1024;

bool is_whole(const ContrastArgs& args, const ForwardPlan& plan) {
  // float64 is for checking gradients: nobody waits for it.
  return !plan.panels && plan.engine.format != Format::kFloat64 && plan.tile == 1 &&
         std::max(args.num_anchors, args.num_keys) <= kWholeRows;
}

// Enough blocks for the tiles, and further ones for as many rows as they can prepare at once.
Grid whole_grid(const ContrastArgs& args, const Grid& tiles) {
  const int64_t rows = args.num_anchors + (args.symmetric ? 0 : args.num_keys);
  const int64_t blocks = std::min(ceil_div(rows, kRowsPerBlock), kBlocksAtOnce);
  if (args.symmetric) return {uint32_t(std::max<int64_t>(tiles.x, blocks))};
  return {tiles.x, uint32_t(std::max<int64_t>(tiles.y, blocks / tiles.x))};
}

// The narrowest with as few chunks of the gradient as the widest: each chunk computes the logits again.
int choose_backward_tile(const EngineTiles& tiles, bool bounded, int64_t stride) {
  int count = 0;
  while (count < tiles.num_backward && (bounded || tiles.backward[count].unbounded)) ++count;
  const int64_t fewest = ceil_div(stride, tiles.backward[count - 1].width);
  int tile = 0;
  while (ceil_div(stride, tiles.backward[tile].width) > fewest) ++tile;
  return tile;
}

// The plan's number of parts of a side, or as many as the caller allows.
int64_t at_most_parts(const ContrastArgs& args, int64_t parts) {
  return args.max_parts > 0 ? std::min(parts, args.max_parts) : parts;
}

// Into how many parts the other side is cut where few blocks own rows.
int64_t choose_splits(const BackwardTile& tile, int64_t blocks, int64_t others) {
  // Each split writes and reads the gradient once more; sharing three tiles is not worth a launch.
  constexpr int64_t kMaxSplits = 16, kWorthSplitting = 4;
  const int64_t tiles = ceil_div(others, tile.columns);
  if (blocks == 0 || tiles < kWorthSplitting) return 1;
  return std::clamp<int64_t>(kMultiprocessors * tile.blocks / blocks, 1, std::min(tiles, kMaxSplits));
}

// Its shares lie in the workspace from `end` on, which becomes the end of them.
GradientPlan plan_gradient(const ContrastArgs& args, const BackwardTile& tile, int64_t chunks, int64_t rows,
                           int64_t others, size_t& end) {
  GradientPlan plan{};
  plan.row_tiles = ceil_div(rows, tile.rows);
  plan.splits = at_most_parts(args, choose_splits(tile, plan.row_tiles * chunks, others));
  plan.shares_at = end;
  if (plan.splits > 1) end += aligned(size_t(acc_bytes(args.dtype) * plan.splits * rows * args.stride));
  return plan;
}

}  // namespace

ForwardPlan plan_forward(const ContrastArgs& args, const Device& device) {
  // A slot costs six or eight numbers per anchor.
  constexpr int64_t kMaxGroups = 32, kMaxSplits = 128;
  ForwardPlan plan{};
  plan.engine = engine_for(args, device.architecture);
  plan.panels = choose_panels(args, plan.engine.format);
  const EngineTiles tiles = engine_tiles(device.architecture, plan.engine.format);
  plan.tile = choose_forward_tile(args, tiles, device);
  const int64_t row_tiles = ceil_div(args.num_anchors, tiles.forward[plan.tile]);
  const int64_t col_tiles = ceil_div(args.num_keys, tiles.forward[plan.tile]);
  const bool any_pairs = row_tiles > 0 && col_tiles > 0;
  if (any_pairs && args.symmetric) {
    plan.groups = std::min(col_tiles, kMaxGroups);
  } else if (any_pairs) {
    // About four blocks for each that runs, so that the last ones leave little idle; more only where a slot
    // could not count its keys.
    const int64_t blocks = is_whole(args, plan) ? kBlocksAtOnce : 4 * kMultiprocessors + row_tiles - 1;
    plan.groups = std::max(std::min({blocks / row_tiles, kMaxSplits, col_tiles}),
                           ceil_div(args.num_keys, kMostCounted / 2));
  }
  plan.groups = at_most_parts(args, plan.groups);
  plan.grid = args.symmetric ? Grid{uint32_t(triangle(plan.groups))}
                             : Grid{uint32_t(row_tiles), uint32_t(plan.groups)};
  plan.whole_grid = any_pairs && is_whole(args, plan) ? whole_grid(args, plan.grid) : Grid{0};
  size_t panel_bytes = 0;
  if (plan.panels) {
    plan.shape = panel_shape(args);
    const PanelShape tile = panel_tile(args.dtype);
    plan.groups = ceil_div(plan.shape.columns, tile.columns);
    if (args.symmetric) plan.groups += ceil_div(plan.shape.rows, tile.rows);
    panel_bytes = size_t(acc_bytes(args.dtype) * plan.shape.rows * plan.shape.columns);
  }
  // The pass over tiles sets the ticket to 0; without it, a single block of the merge needs none.
  plan.merge_blocks = any_pairs ? ceil_div(args.num_anchors, kMergeRows) : 1;
  const size_t acc = size_t(acc_bytes(args.dtype)), fields = size_t(num_fields(!plan.engine.bounded));
  plan.block_sums_at = kAlignment;
  plan.slots_at = plan.block_sums_at + aligned(2 * acc * size_t(plan.merge_blocks));
  plan.panel_at = plan.slots_at + aligned(acc * fields * size_t(plan.groups) * size_t(args.num_anchors));
  plan.workspace_bytes = plan.panel_at + aligned(panel_bytes);
  return plan;
}

BackwardPlan plan_backward(const ContrastArgs& args, const Device& device) {
  const Engine engine = engine_for(args, device.architecture);
  BackwardPlan plan{};
  plan.engine = engine;
  plan.panels = choose_panels(args, engine.format);
  if (plan.panels) {
    plan.shape = panel_shape(args);
    const int64_t numbers = plan.shape.rows * plan.shape.columns;
    const bool half = element_bytes(args.dtype) < acc_bytes(args.dtype);
    plan.panel_at = kAlignment;
    plan.workspace_bytes = plan.panel_at + aligned(size_t(acc_bytes(args.dtype) * numbers));
    plan.gradients_at = half ? plan.workspace_bytes : plan.panel_at;
    if (half) plan.workspace_bytes += aligned(size_t(element_bytes(args.dtype) * numbers));
    return plan;
  }
  const EngineTiles tiles = engine_tiles(engine.architecture, engine.format);
  plan.tile = choose_backward_tile(tiles, engine.bounded, args.stride);
  const BackwardTile& tile = tiles.backward[plan.tile];
  plan.chunks = ceil_div(args.stride, tile.width);
  const int64_t m = args.num_anchors, n = args.num_keys;
  size_t& end = plan.workspace_bytes;
  plan.anchors = plan_gradient(args, tile, plan.chunks, m, n, end);
  if (!args.symmetric) plan.keys = plan_gradient(args, tile, plan.chunks, n, m, end);
  // A block looks at so many anchors in less time than a launch takes.
  constexpr int64_t kFewAnchors = 4096;
  plan.finds_unit = engine.format == Format::kFloat16 && m > kFewAnchors;
  plan.unit_at = end;
  if (plan.finds_unit) end += kAlignment;
  return plan;
}

}  // namespace clce::cuda
