// A panel of pairs, for the walk on the host and the kernels on the device.
#pragma once

#include <cstdint>

namespace clce::cuda {

// Anchors [row, row + rows) against keys [column, column + columns).
struct Panel {
  int64_t row, rows, column, columns;
};

}  // namespace clce::cuda
