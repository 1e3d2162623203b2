#include "cuda/instances/forward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_FORWARD(HalfEngine<ptx::bf16>)
}  // namespace clce::cuda
