// Inside the CUDA backend: how the work is cut, and the two passes that are compiled per engine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.h"

namespace clce::cuda {

// How forward cuts the logits; a function of the arguments alone, so that bits do not depend on the device.
struct ForwardPlan {
  bool large_tiles;
  int64_t row_tiles, groups;  // see ForwardParams
};

// One gradient: of the rows of `owner`, from all rows of the other side.
struct GradientPass {
  bool owner_is_keys;
  void* gradient;  // acc [splits][rows][stride]
  int64_t splits;
};

struct BackwardPlan {
  int64_t row_tiles, chunks, splits;
};

template <class Engine>
ForwardPlan plan_forward(const ContrastArgs&);
template <class Engine>
BackwardPlan plan_backward(const ContrastArgs&, bool owner_is_keys);
template <class Engine>
void forward_tiles(const ContrastArgs&, const ForwardPlan&, void* slots, uint32_t* ticket, void* stream);
template <class Engine>
void backward_tiles(const BackwardArgs&, const GradientPass&, void* stream);

}  // namespace clce::cuda
