// The passes over rows, of one side or of two in one launch.
#pragma once

#include "backend.h"

namespace clce::cuda {

// prepare() of each side that has rows.
void prepare_sides(DType dtype, const PrepareArgs& first, const PrepareArgs& second, void* stream);

// prepare_backward() of a gradient that is the sum of shares, [shares][rows][stride] one after the other. If
// there are several, the first is used up.
struct Projection {
  PrepareBackwardArgs args;
  int64_t shares = 1;
};
void project_sides(DType dtype, const Projection& first, const Projection& second, void* stream);

}  // namespace clce::cuda
