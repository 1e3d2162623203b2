// The one place where the formulas learn whether they are compiled for a device.
#pragma once

#if defined(__CUDACC__)
#define CLCE_HD __host__ __device__ __forceinline__
#else
#define CLCE_HD inline
#endif
