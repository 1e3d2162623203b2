#include "cuda/sm80/backward.cuh"

namespace clce::cuda::sm80 {
template void backward_tiles<Format::kFloat32>(const BackwardArgs&, const BackwardPlan&, void*);
}  // namespace clce::cuda::sm80
