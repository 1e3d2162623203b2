#include "cuda/instances/backward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_BACKWARD(Tf32Engine)
}  // namespace clce::cuda
