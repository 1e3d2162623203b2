// The engine of panels: products by a library, and between them two kernels that go over a panel of logits.
#pragma once

#include "cuda/plan/plan.h"

namespace clce::cuda {

// Partial sums of every anchor into the workspace's slots; sets the ticket to 0.
void forward_panels(const ForwardArgs&, const ForwardPlan&, void* stream);

// The gradients that are wanted.
void backward_panels(const BackwardArgs&, const BackwardPlan&, void* stream);

}  // namespace clce::cuda
