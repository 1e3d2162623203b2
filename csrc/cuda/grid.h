// How work is cut into blocks, for plans on the host and kernels on the device.
#pragma once

#include <cstdint>

#include "family/macros.h"

namespace clce::cuda {

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

// A block of the passes over rows: a warp to a row.
constexpr int kRowsPerBlock = 4;

// A block of the merge: kMergeParts threads to a row.
constexpr int kMergeRows = 32, kMergeParts = 4, kMergeThreads = kMergeRows * kMergeParts;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Where part `part` of `parts` begins, if `count` things are cut evenly.
CLCE_HD int part_begin(uint32_t count, uint32_t parts, uint32_t part) {
  const uint32_t longer = count % parts;
  return int(part * (count / parts) + (part < longer ? part : longer));
}

}  // namespace clce::cuda
