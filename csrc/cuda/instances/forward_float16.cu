#include "cuda/instances/forward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_FORWARD(HalfEngine<ptx::f16>)
}  // namespace clce::cuda
