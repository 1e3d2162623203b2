// The matrix product of the cuBLAS that torch has loaded, for the engine of panels.
#pragma once

#include "backend.h"

namespace clce::binding {

// On CUDA memory, the current device and its current stream, with torch's handle and workspace: what torch's
// own products use. Called without torch's dispatcher and without Python, it costs the host a launch. Nothing
// where torch's cuBLAS cannot be found, as where a torch has it linked in: then there are no panels.
ProductFunction torch_product();

}  // namespace clce::binding
