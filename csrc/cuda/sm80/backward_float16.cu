#include "cuda/sm80/backward.cuh"

template void clce::cuda::sm80::backward_tiles<clce::cuda::Format::kFloat16>(const BackwardArgs&,
                                                                             const GradientPlan&, void*);
