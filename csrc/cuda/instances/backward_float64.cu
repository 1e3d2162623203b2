#include "cuda/instances/backward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_BACKWARD(FmaEngine<double>)
}  // namespace clce::cuda
