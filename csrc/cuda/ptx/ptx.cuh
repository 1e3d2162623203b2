// Everything the kernels ask of the hardware, by name. Kernels use these functions, threadIdx, blockIdx,
// blockDim and gridDim, and nothing else of CUDA, so that they can be compiled for other machines too: a
// build that defines CLCE_PTX_HEADER names a header with the same functions for its machine.
//
//   threads     thread_again, sync_threads, sync_warp
//   grid        sync_grid                                              (launch_phases in launch.cuh alone)
//   warps       shuffle_xor, any_sync, ballot, kept                                (all 32 lanes take part)
//   memory      shared_load, shared_store, global_load, global_store               (every ordinary access)
//               dynamic_shared, fence_device, atomic_add                           (uint32_t, device scope)
//   async copy  cp_async<16>, cp_async_commit, cp_async_wait<N>
//   matrices    ldmatrix_x4, ldmatrix_x4_trans, mma_m16n8k16 (bf16, f16), mma_m16n8k8_tf32, to_tf32
//   arithmetic  exp2_fast, to_float, to_bf16, to_f16, pack_bf16x2, pack_f16x2
//   events      count_tile, count_step, count_copy                        (for an executor; nothing to run)
//   hint        opaque                                                 (to the compiler; nothing to run)
//   macros      CLCE_KERNEL, CLCE_LAUNCH_BOUNDS(threads, blocks), CLCE_DEVICE
#pragma once

#if defined(CLCE_PTX_HEADER)
#include CLCE_PTX_HEADER
#else

#define CLCE_KERNEL __global__
#define CLCE_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define CLCE_DEVICE __device__ __forceinline__

#include "cuda/ptx/types.cuh"

#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/events.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/warp.cuh"

#endif
