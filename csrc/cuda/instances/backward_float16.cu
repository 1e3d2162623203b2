#include "cuda/instances/backward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_BACKWARD(HalfEngine<ptx::f16>)
}  // namespace clce::cuda
