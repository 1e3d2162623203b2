#include "cuda/instances/forward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_FORWARD(FmaEngine<float>)
}  // namespace clce::cuda
