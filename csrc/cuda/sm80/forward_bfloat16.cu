#include "cuda/sm80/forward.cuh"

template void clce::cuda::sm80::forward_tiles<clce::cuda::Format::kBFloat16>(const ForwardArgs&,
                                                                             const ForwardPlan&, void*);
