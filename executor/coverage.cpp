#include "executor/coverage.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "executor/machine.h"

namespace clce::executor {

void Walk::add_tile(int64_t tile_steps) {
  ++tiles;
  steps = std::max(steps, tile_steps);
  if (tile_steps > 1) ++several_step_tiles;
}

void Walk::add_step(int place) {
  if (place == 0 && place_before >= 0) ++wraps;
  place_before = place;
}

void Walk::merge(const Walk& other) {
  tiles = std::max(tiles, other.tiles);
  steps = std::max(steps, other.steps);
  several_step_tiles = std::max(several_step_tiles, other.several_step_tiles);
  wraps = std::max(wraps, other.wraps);
  partial_rows |= other.partial_rows;
  partial_columns |= other.partial_columns;
}

Coverage::Coverage() {
  const char* const path = std::getenv("CLCE_EXECUTOR_COVERAGE");
  if (path == nullptr) return;
  path_ = path;
  std::atexit([] { machine().coverage.write(); });
}

void Coverage::start_launch(const void* kernel, int64_t blocks) {
  current_ = &kernels_[kernel];
  current_->blocks = std::max(current_->blocks, blocks);
}

void Coverage::write() const {
  std::FILE* const file = std::fopen(path_.c_str(), "w");
  if (file == nullptr) {
    std::perror(path_.c_str());
    std::_Exit(1);
  }
  std::fprintf(file,
               "kernel\tblocks\ttiles\tsteps\tseveral_step_tiles\twraps\tpartial_rows\tpartial_columns\n");
  for (const auto& [kernel, runs] : kernels_) {
    Dl_info info;
    // Kernels of tests have internal linkage, and no name.
    if (dladdr(kernel, &info) == 0 || info.dli_saddr != kernel) continue;
    const Walk& w = runs.walk;
    std::fprintf(file, "%s\t%lld\t%lld\t%lld\t%lld\t%lld\t%d\t%d\n", info.dli_sname,
                 static_cast<long long>(runs.blocks), static_cast<long long>(w.tiles),
                 static_cast<long long>(w.steps), static_cast<long long>(w.several_step_tiles),
                 static_cast<long long>(w.wraps), w.partial_rows, w.partial_columns);
  }
  std::fclose(file);
}

}  // namespace clce::executor
