#include "cuda/sm80/backward.cuh"

template void clce::cuda::sm80::backward_tiles<clce::cuda::Format::kTf32>(const BackwardArgs&,
                                                                          const GradientPlan&, void*);
