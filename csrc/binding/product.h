// torch's matrix product, for the engine of panels.
#pragma once

#include "backend.h"

namespace clce::binding {

// On CUDA tensors' memory, the current device and its current stream. TF32 is as torch's switches say.
ProductFunction torch_product();

}  // namespace clce::binding
