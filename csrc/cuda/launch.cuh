// How the host starts kernels, and what it asks about the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/grid.h"
#include "cuda/list.h"

#if defined(CLCE_LAUNCH_HEADER)
#include CLCE_LAUNCH_HEADER  // the same functions for another machine, as in ptx/ptx.cuh
#else

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/ptx/ptx.cuh"

namespace clce::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next one who asks would be told of it
    throw std::runtime_error(std::string("clce_ext: ") + what + ": " + cudaGetErrorString(status));
  }
}

// Sets memory to zeros on the stream.
inline void clear(void* to, size_t bytes, void* stream) {
  check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)), "clear");
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

template <class Params>
void allow_shared_bytes(void (*kernel)(Params), const char* name, size_t bytes) {
  // Without this a block gets 48 KiB at most.
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (bytes <= kDefaultSharedBytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        name);
}

// Starts kernel(params) on the stream; an empty grid is no launch.
template <class Params>
void launch(void (*kernel)(Params), const char* name, Grid grid, int threads, size_t shared_bytes,
            void* stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared_bytes(kernel, name, shared_bytes);
  // Not the chevrons, which a formatter for C++ tears apart.
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(threads),
                         arguments, shared_bytes, static_cast<cudaStream_t>(stream)),
        name);
}

template <class Params, class First, class... Others>
CLCE_DEVICE void run_phases(const Params& params, List<First, Others...>) {
  First::run(params);
  ((ptx::sync_grid(), Others::run(params)), ...);
}

template <class Whole>
CLCE_KERNEL void CLCE_LAUNCH_BOUNDS(Whole::kThreads, Whole::kMinBlocks)
    phases_kernel(typename Whole::Params params) {
  run_phases(params, typename Whole::Phases{});
}

// How many blocks of the kernel can meet on the current device: as many as it has room for at once, or 0
// where it lets none meet. It is asked once: a small batch is over before the host has asked again.
template <class Whole>
int64_t room_for(const char* name) {
  constexpr int kDevices = 64;
  static std::atomic<int64_t> known[kDevices];  // plus 1; 0: not asked yet
  int device = 0;
  check(cudaGetDevice(&device), "no current CUDA device");
  if (device < kDevices && known[device] > 0) return known[device] - 1;
  int multiprocessors = 0, blocks = 0, can_meet = 0;
  check(cudaDeviceGetAttribute(&can_meet, cudaDevAttrCooperativeLaunch, device), "cooperative launches");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  allow_shared_bytes(phases_kernel<Whole>, name, Whole::kSharedBytes);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, phases_kernel<Whole>, Whole::kThreads,
                                                      Whole::kSharedBytes),
        name);
  const int64_t room = can_meet ? int64_t(blocks) * multiprocessors : 0;
  if (device < kDevices) known[device] = room + 1;
  return room;
}

// Starts one kernel of several phases, Phase::run(params) for each of Whole::Phases: all blocks have ended
// one before any begins the next, which sees what they wrote to global memory. For that all of them must be
// on the device at once; where there is no room for them nothing is started, and the answer is false.
template <class Whole>
bool launch_phases(const char* name, Grid grid, void* stream, const typename Whole::Params& params) {
  if (int64_t(grid.x) * grid.y * grid.z > room_for<Whole>(name)) return false;
  void* arguments[] = {const_cast<typename Whole::Params*>(&params)};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(phases_kernel<Whole>),
                                    dim3(grid.x, grid.y, grid.z), dim3(Whole::kThreads), arguments,
                                    Whole::kSharedBytes, static_cast<cudaStream_t>(stream)),
        name);
  return true;
}

}  // namespace clce::cuda

#endif
