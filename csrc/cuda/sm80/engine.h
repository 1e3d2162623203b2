// The engine of sm_80 and later: cp.async, ldmatrix and mma.sync. What it does in each pass, for each format.
#pragma once

#include "cuda/plan/plan.h"

namespace clce::cuda::sm80 {

// Partial sums of every anchor into the workspace's slots; sets the ticket to 0.
template <Format format>
void forward_tiles(const ForwardArgs&, const ForwardPlan&, void* stream);

// The whole forward pass in one launch, where the plan has it; false, and nothing done, where the device has
// no room for it.
template <Format format>
bool forward_whole(const ForwardArgs&, const ForwardPlan&, void* stream);

// The gradients that are wanted, or their shares into the workspace.
template <Format format>
void backward_tiles(const BackwardArgs&, const BackwardPlan&, void* stream);

}  // namespace clce::cuda::sm80
