// How the host starts kernels, and what it asks about the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/grid.h"

#if defined(CLCE_LAUNCH_HEADER)
#include CLCE_LAUNCH_HEADER  // the same functions for another machine, as in ptx/ptx.cuh
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace clce::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next one who asks would be told of it
    throw std::runtime_error(std::string("clce_ext: ") + what + ": " + cudaGetErrorString(status));
  }
}

// Of the current device: 90 stands for 9.0.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "no current CUDA device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return 10 * major + minor;
}

// Of the current device: shared memory for all blocks that run on a multiprocessor at once.
inline int shared_bytes_of_multiprocessor() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "no current CUDA device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), "shared memory");
  return bytes;
}

// Starts kernel(params) on the stream; an empty grid is no launch.
template <class Params>
void launch(void (*kernel)(Params), const char* name, Grid grid, int threads, size_t shared_bytes,
            void* stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // Without this a block gets 48 KiB at most.
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (shared_bytes > kDefaultSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  // Not the chevrons, which a formatter for C++ tears apart.
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(threads),
                         arguments, shared_bytes, static_cast<cudaStream_t>(stream)),
        name);
}

}  // namespace clce::cuda

#endif
