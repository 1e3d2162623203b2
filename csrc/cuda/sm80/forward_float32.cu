#include "cuda/sm80/forward.cuh"

namespace clce::cuda::sm80 {
template void forward_tiles<Format::kFloat32>(const ForwardArgs&, const ForwardPlan&, void*);
}  // namespace clce::cuda::sm80
