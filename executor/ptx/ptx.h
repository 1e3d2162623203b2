// The primitives of csrc/cuda/ptx on the executor. Meaning and fragment layouts are those of the PTX ISA
// manual (sections "mma.m16n8k16", "mma.m16n8k8", "ldmatrix", "cp.async", "shfl.sync", "barrier").
#pragma once

#include "cuda/ptx/types.cuh"

#include "executor/ptx/arithmetic.h"
#include "executor/ptx/async_copy.h"
#include "executor/ptx/events.h"
#include "executor/ptx/matrix.h"
#include "executor/ptx/memory.h"
#include "executor/ptx/warp.h"

#define CLCE_KERNEL
#define CLCE_LAUNCH_BOUNDS(threads, blocks)
#define CLCE_DEVICE inline

#define threadIdx (::clce::executor::thread().index)
#define blockIdx (::clce::executor::thread().block->index)
#define blockDim (::clce::executor::thread().block->dim)
#define gridDim (::clce::executor::thread().block->grid)
