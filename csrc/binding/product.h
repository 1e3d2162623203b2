// torch's matrix product, for the engine of panels.
#pragma once

#include "backend.h"

namespace clce::binding {

// On CUDA memory, the current device and its current stream. TF32 is as torch's switches say.
//
// It calls the op clce_ext_backend::multiply, which clce_ext/backends.py makes of torch.mm and torch.addmm:
// their own ops take numbers of any type, which the stable ABI cannot hand over (up to torch 2.15).
ProductFunction torch_product();

}  // namespace clce::binding
