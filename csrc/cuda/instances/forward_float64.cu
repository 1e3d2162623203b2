#include "cuda/instances/forward.cuh"

namespace clce::cuda {
CLCE_INSTANTIATE_FORWARD(FmaEngine<double>)
}  // namespace clce::cuda
