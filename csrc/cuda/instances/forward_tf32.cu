#include "cuda/instances/forward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_FORWARD(Tf32Engine)
}  // namespace clce::cuda
