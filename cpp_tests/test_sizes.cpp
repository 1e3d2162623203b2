// Sizes that no test can run: what is launched for four million rows, checked and recorded but not executed,
// and how keys are counted where float32 has not all numbers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "check.h"
#include "cuda/kernels/merge_loss.cuh"
#include "cuda/kernels/prepare.cuh"
#include "cuda/launch.cuh"
#include "cuda/panels/walk.h"
#include "cuda/plan/plan.h"
#include "executor/executor.h"

using namespace clce;
using executor::GlobalArray;

namespace {

constexpr int64_t kRows = int64_t(1) << 22;
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

// Addresses that nothing reads.
void* somewhere() {
  static uintptr_t next = uintptr_t(1) << 44;
  next += uintptr_t(1) << 42;
  return reinterpret_cast<void*>(next);
}

struct RecordingOnly {
  RecordingOnly() {
    executor::clear_launches();
    executor::set_recording_only(true);
  }
  ~RecordingOnly() { executor::set_recording_only(false); }
};

ContrastArgs contrast_of(DType dtype, int64_t rows, int64_t dim, bool symmetric) {
  ContrastArgs args;
  args.dtype = dtype;
  args.num_anchors = args.num_keys = rows;
  args.dim = dim;
  args.stride = padded_dim(dim);
  args.anchors = somewhere();
  args.keys = symmetric ? args.anchors : somewhere();
  args.symmetric = args.has_self = symmetric;
  args.bounded = true;
  return args;
}

// Which gradients are asked for, where the keys are not the anchors.
enum class Wanted { kBoth, kAnchors, kKeys };

// All steps of a loss: each pass in one call, or each step in its own.
void call_everything(const ContrastArgs& contrast, bool in_one_call, Wanted wanted = Wanted::kBoth) {
  PrepareArgs prepare;
  prepare.dtype = contrast.dtype;
  prepare.rows = contrast.num_anchors;
  prepare.dim = prepare.x_row_stride = contrast.dim;
  prepare.x = somewhere();
  prepare.z = somewhere();
  prepare.norms = somewhere();

  ForwardArgs forward;
  forward.contrast = contrast;
  forward.statistics = somewhere();
  forward.workspace = somewhere();
  forward.with_loss = true;
  LossArgs& loss = forward.loss;
  loss.dtype = contrast.dtype;
  loss.num_anchors = contrast.num_anchors;
  loss.statistics = forward.statistics;
  loss.loss = somewhere();
  loss.num_terms = somewhere();
  loss.derivatives = somewhere();

  BackwardArgs backward;
  backward.contrast = contrast;
  backward.statistics = forward.statistics;
  backward.derivatives = loss.derivatives;
  backward.num_terms = loss.num_terms;
  backward.danchors = wanted == Wanted::kKeys ? nullptr : somewhere();
  backward.dkeys = contrast.symmetric || wanted == Wanted::kAnchors ? nullptr : somewhere();
  backward.workspace = somewhere();

  PrepareBackwardArgs project;
  project.dtype = contrast.dtype;
  project.rows = contrast.num_anchors;
  project.dim = contrast.dim;
  project.z = contrast.anchors;
  project.norms = prepare.norms;
  project.dz = backward.danchors;
  project.dx = somewhere();

  if (!in_one_call) {
    cuda::prepare(prepare, nullptr);
    cuda::forward(forward, nullptr);
    cuda::backward(backward, nullptr);
    cuda::prepare_backward(project, nullptr);
    return;
  }
  forward.prepare_anchors = prepare;
  if (backward.danchors) backward.project_anchors = project;
  if (!contrast.symmetric) {
    forward.prepare_keys = prepare;
    forward.prepare_keys.rows = contrast.num_keys;
    if (backward.dkeys) backward.project_keys = project;
    backward.project_keys.rows = contrast.num_keys;
  }
  cuda::forward(forward, nullptr);
  cuda::backward(backward, nullptr);
}

double blocks_of(const executor::Launch& launch) {
  return double(launch.grid.x) * launch.grid.y * launch.grid.z;
}

std::string kernels() {
  std::string names;
  for (const executor::Launch& launch : executor::launches()) {
    names += (names.empty() ? "" : " ") + launch.kernel;
  }
  return names;
}

// Small batches wait for launches: one makes the forward pass, two the backward pass, whichever gradients are
// wanted.
TEST("sizes/launches of small batches") {
  constexpr const char* kProjected = "backward_kernel prepare_backward_kernel";
  const auto launches = [](const ContrastArgs& args, Wanted wanted) {
    const RecordingOnly recording;
    call_everything(args, /*in_one_call=*/true, wanted);
    return kernels();
  };
  const std::pair<DType, bool> formats[] = {
      {DType::kFloat32, false}, {DType::kFloat32, true}, {DType::kBFloat16, false}, {DType::kFloat16, false}};
  for (auto [dtype, tf32] : formats) {
    for (int64_t rows : {1, 64, 65, 256, 1000, 1024}) {
      for (int64_t dim : {128, 256, 768}) {
        ContrastArgs args = contrast_of(dtype, rows, dim, true);
        args.allow_tf32 = tf32;
        const std::string small = std::string("whole_forward ") + kProjected;
        CHECK_EQ(launches(args, Wanted::kAnchors), small);
        args.bounded = false;
        CHECK_EQ(launches(args, Wanted::kAnchors), small);
        args.bounded = true;
        args.temperature_ptr = somewhere();
        CHECK_EQ(launches(args, Wanted::kAnchors),
                 std::string("whole_forward backward_kernel ") + kProjected);
        args.temperature_ptr = nullptr;
        args.symmetric = args.has_self = false;
        args.keys = somewhere();
        for (int64_t keys : {int64_t(1), rows, int64_t(333), int64_t(1024)}) {
          args.num_keys = keys;
          const auto plan = cuda::plan_backward(args, cuda::Architecture::kSm80);
          for (Wanted wanted : {Wanted::kBoth, Wanted::kAnchors, Wanted::kKeys}) {
            CHECK_EQ(launches(args, wanted), small);
            int64_t blocks = 0;
            if (wanted != Wanted::kKeys) blocks += plan.anchors.row_tiles * plan.anchors.splits;
            if (wanted != Wanted::kAnchors) blocks += plan.keys.row_tiles * plan.keys.splits;
            CHECK_EQ(blocks_of(executor::launches()[1]), double(blocks * plan.chunks));
          }
          // A device that has no room for all blocks at once.
          executor::set_blocks_at_once(0);
          CHECK_EQ(launches(args, Wanted::kBoth),
                   std::string("prepare_kernel forward_kernel merge_loss_kernel ") + kProjected);
          executor::set_blocks_at_once(216);
        }
      }
    }
  }
}

// Blocks that meet are no more than may be at once, and enough for the tiles and for the merge.
TEST("sizes/grids of small batches") {
  for (DType dtype : kDTypes) {
    for (int64_t anchors = 1; anchors <= 1100; anchors += 13) {
      for (int64_t keys = 1; keys <= 1100; keys += 17) {
        ContrastArgs args = contrast_of(dtype, anchors, 128, false);
        for (bool symmetric : {false, true}) {
          args.symmetric = symmetric;
          args.num_keys = symmetric ? anchors : keys;
          const auto plan = cuda::plan_forward(args, cuda::Architecture::kSm80);
          const cuda::Grid& whole = plan.whole_grid;
          const bool small = std::max(anchors, args.num_keys) <= 1024;
          CHECK_EQ(whole.x > 0, small && dtype != DType::kFloat64);
          if (whole.x == 0) continue;
          CHECK(whole.x >= plan.grid.x && whole.y >= plan.grid.y && whole.z == 1);
          CHECK(symmetric ? whole.y == 1 : whole.x == plan.grid.x);
          CHECK(int64_t(whole.x) * whole.y <= 216 && int64_t(whole.x) * whole.y >= plan.merge_blocks);
        }
      }
    }
  }
}

// The grids have room for every row, tile and number, counted in double, which nothing overflows here.
TEST("sizes/four million rows") {
  for (DType dtype : kDTypes) {
    for (int64_t dim : {128, 768}) {
      for (bool symmetric : {true, false}) {
        for (bool bounded : {true, false}) {
          ContrastArgs args = contrast_of(dtype, kRows, dim, symmetric);
          args.bounded = bounded;
          const auto tiles = cuda::engine_tiles(cuda::Architecture::kSm80, cuda::format_of(args));
          const RecordingOnly recording;
          call_everything(args, /*in_one_call=*/false);
          int forward = 0, backward = 0;
          for (const executor::Launch& launch : executor::launches()) {
            if (launch.kernel == "prepare_kernel" || launch.kernel == "prepare_backward_kernel") {
              CHECK_EQ(blocks_of(launch), std::ceil(double(kRows) / cuda::kRowsPerBlock));
            } else if (launch.kernel == "merge_loss_kernel") {
              CHECK_EQ(blocks_of(launch), std::ceil(double(kRows) / cuda::kMergeRows));
            } else if (launch.kernel == "forward_kernel") {
              ++forward;
              const auto plan = cuda::plan_forward(args, cuda::Architecture::kSm80);
              const double groups = double(plan.groups);
              CHECK_EQ(blocks_of(launch), symmetric ? groups * (groups + 1) / 2
                                                    : groups * std::ceil(double(kRows) / tiles.forward[0]));
              const double slots = (bounded ? 6.0 : 8.0) * groups * double(kRows) * acc_bytes(dtype);
              CHECK(double(plan.workspace_bytes) >= slots && double(plan.workspace_bytes) < 1.1 * slots);
            } else if (launch.kernel == "find_unit_kernel") {
              CHECK(dtype == DType::kFloat16);
              CHECK_EQ(blocks_of(launch), 1);  // it looks at every row
            } else {
              CHECK_EQ(launch.kernel, std::string("backward_kernel"));
              ++backward;
              const auto plans = cuda::plan_backward(args, cuda::Architecture::kSm80);
              const auto& tile = tiles.backward[plans.tile];
              CHECK(plans.anchors.splits == 1 && (symmetric || plans.keys.splits == 1));
              // Nothing, but for float16's unit.
              CHECK_EQ(plans.workspace_bytes, dtype == DType::kFloat16 ? 256u : 0u);
              CHECK_EQ(blocks_of(launch), (symmetric ? 1 : 2) * std::ceil(double(kRows) / tile.rows) *
                                              std::ceil(double(args.stride) / tile.width));
            }
          }
          CHECK_EQ(forward, 1);
          CHECK_EQ(backward, 1);
        }
      }
    }
  }
}

// A queue of keys: few blocks own anchors, so they share the keys, and the shares are added up.
TEST("sizes/four million keys") {
  for (DType dtype : kDTypes) {
    ContrastArgs args = contrast_of(dtype, 4096, 4096, false);
    args.num_keys = kRows;
    const auto plan = cuda::plan_backward(args, cuda::Architecture::kSm80);
    const RecordingOnly recording;
    call_everything(args, /*in_one_call=*/false);
    double added = 0;
    for (const executor::Launch& launch : executor::launches()) {
      if (launch.kernel == "reduce_kernel") added += blocks_of(launch) * launch.block.x;
    }
    // Numbers of the anchors' gradient, 16 bytes to a thread.
    const double numbers = plan.anchors.splits == 1 ? 0 : double(args.num_anchors) * double(args.stride);
    CHECK_EQ(added, numbers * acc_bytes(dtype) / 16);
    CHECK_EQ(double(plan.workspace_bytes),
             plan.anchors.splits == 1 ? 0 : numbers * acc_bytes(dtype) * double(plan.anchors.splits));
  }
}

// Every pair of rows is in one panel, and panels keep to the size that the plan has room for.
TEST("sizes/four million rows in panels") {
  ContrastArgs args = contrast_of(DType::kBFloat16, kRows, 768, true);
  args.panel_rows = args.panel_columns = 1 << 15;
  args.engine = EngineChoice::kPanels;
  args.product.multiply = [](void*, const MatrixProduct& product, void*) {
    CHECK(product.rows > 0 && product.columns > 0 && product.inner > 0);
  };
  const auto plan = cuda::plan_forward(args, cuda::Architecture::kSm80);
  CHECK(plan.panels);
  double pairs = 0;
  cuda::for_each_panel(args, plan.shape, [&](const cuda::Panel& panel) {
    CHECK(panel.rows <= plan.shape.rows && panel.columns <= plan.shape.columns);
    CHECK(panel.row + panel.rows <= kRows && panel.column + panel.columns <= kRows);
    const int64_t end = panel.column + panel.columns;
    // Rows before the first column have all columns; row r of the others has end - 1 - r.
    const int64_t full = std::clamp<int64_t>(panel.column - panel.row, 0, panel.rows);
    const int64_t first = std::max<int64_t>(end - 1 - panel.row - full, 0);
    const int64_t last = std::max<int64_t>(end - panel.row - panel.rows, 0);
    pairs += double(full) * double(panel.columns);
    if (panel.rows > full) pairs += double(first + last) * double(first - last + 1) / 2;
  });
  CHECK_EQ(pairs, double(kRows) * double(kRows - 1) / 2);
  const RecordingOnly recording;
  call_everything(args, /*in_one_call=*/false);
  for (const executor::Launch& launch : executor::launches()) {
    if (launch.kernel == "panel_sums_kernel") {
      const auto tile = cuda::panel_tile(args.dtype);
      CHECK(blocks_of(launch) * double(tile.rows * tile.columns) <=
            double(plan.shape.rows) * double(plan.shape.columns));
    }
  }
}

// No slot has more keys than the accumulation type counts one by one.
TEST("sizes/slots can count their keys") {
  for (int64_t keys = 1; keys < int64_t(1) << 32; keys = keys * 3 + 1) {
    for (int64_t anchors : {int64_t(1), int64_t(300), kRows}) {
      ContrastArgs args = contrast_of(DType::kBFloat16, anchors, 512, false);
      args.num_keys = keys;
      args.product.multiply = [](void*, const MatrixProduct&, void*) {};
      for (EngineChoice engine : {EngineChoice::kAuto, EngineChoice::kPanels}) {
        args.engine = engine;
        const auto plan = cuda::plan_forward(args, cuda::Architecture::kSm80);
        const int64_t slots = plan.panels ? 1 : plan.groups;
        CHECK(slots * (int64_t(1) << 24) >= keys);
        CHECK(plan.panels || plan.grid.y <= 65535);
      }
    }
  }
}

// The merge knows the number of keys to the last one, however many slots have them, and rounds it once.
TEST("sizes/counts beyond 2^24") {
  constexpr int64_t kAnchors = 3, kSlots = 9;
  for (float beta : {1.0f, 0.0f}) {
    for (bool unbounded : {false, true}) {
      const int fields = num_fields(unbounded);
      std::vector<float> slots(size_t(kSlots * fields * kAnchors));
      std::vector<double> positives(kAnchors), negatives(kAnchors);
      for (int64_t slot = 0; slot < kSlots; ++slot) {
        for (int64_t row = 0; row < kAnchors; ++row) {
          PartialSums<float> sums;
          // Most of them odd: one after the other, float32 sums would lose each last bit.
          sums.n_pos = slot == 0 ? 16777216.0f : 1.0f;
          sums.n_neg = 16777215.0f - float(row * slot);
          sums.sum_pos = sums.exp_pos = sums.exp_wn = 1.0f;
          sums.exp_w = beta == 0 ? sums.n_neg : 1.0f;
          positives[size_t(row)] += double(sums.n_pos);
          negatives[size_t(row)] += double(sums.n_neg);
          for_each_field<float>(unbounded, [&](int field, auto member) {
            slots[size_t((slot * fields + field) * kAnchors + row)] = sums.*member;
          });
        }
      }
      const GlobalArray<float> memory(slots), statistics(size_t(kNumStatistics * kAnchors));
      cuda::MergeLossParams<float> p{};
      p.rows = kAnchors;
      p.slots = memory.data();
      p.num_slots = kSlots;
      p.unbounded = unbounded;
      p.beta = beta;
      p.statistics = statistics.data();
      p.scale.value = 1;
      cuda::launch(cuda::merge_loss_kernel<float>, "merge_loss_kernel", cuda::Grid{}, cuda::kMergeThreads,
                   cuda::kMergeBytes<float>, nullptr, p);
      const auto found = statistics.read();
      for (int64_t row = 0; row < kAnchors; ++row) {
        const auto at = [&](int name) { return double(found[size_t(name * kAnchors + row)]); };
        CHECK_EQ(at(kNumPos), double(float(positives[size_t(row)])));
        CHECK_EQ(at(kNumNeg), double(float(negatives[size_t(row)])));
        // At beta 0 every hardness weight is 1: the sum of them is their number.
        if (beta == 0 && !unbounded) {
          CHECK(std::abs(at(kLseW) + at(kLseWLow) - std::log(double(float(negatives[size_t(row)])))) < 1e-6);
        }
      }
    }
  }
}

}  // namespace

TEST_MAIN
