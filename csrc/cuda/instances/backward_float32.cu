#include "cuda/instances/backward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_BACKWARD(FmaEngine<float>)
}  // namespace clce::cuda
