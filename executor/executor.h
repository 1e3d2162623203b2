// Runs the CUDA kernels' own source on the CPU and reports what a GPU would punish. This is what tests and
// the kernels' host code use of it.
//
// Thread blocks run one after another; the threads of a block are fibers that run until they have to wait
// for one another. Device addresses are not host addresses: global and shared memory live in reserved,
// inaccessible address ranges and are reached through clce::ptx alone (ptx/ptx.h), which checks every
// access. Whatever goes around it is a segmentation fault with a message, host code included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "executor/banks.h"
#include "executor/dim3.h"
#include "executor/fault.h"
#include "executor/global_buffer.h"

namespace clce::executor {

// In which order threads that could run do run. Results must not depend on it.
enum class Order { kAscending, kDescending, kRandom };
void set_schedule(Order order, uint64_t seed = 0);

// How what GPUs may compute in their own ways is computed. kNearest: every sum of an mma is rounded once, 2^x
// to the nearest number. kCoarse: sums as tensor cores make them (parts of columns, truncated), the last
// columns first, and 2^x up to 2 ulp off. Results must stay within the same bounds. At first it is kCoarse
// where the environment variable CLCE_EXECUTOR_ARITHMETIC is "coarse", else kNearest.
enum class Arithmetic { kNearest, kCoarse };
void set_arithmetic(Arithmetic arithmetic);

// What each launch did, in order; cleared by clear_launches().
struct Launch {
  std::string kernel;
  Dim3 grid, block;
  size_t shared_bytes = 0;
  int64_t mma = 0;                 // warp-wide matrix products
  int64_t ldmatrix = 0;            // 8x8 matrices loaded
  int64_t ldmatrix_conflicts = 0;  // further shared memory cycles they took because of bank conflicts
  BankTraffics banks;              // of loads, stores and asynchronous copies, while they are counted
};
const std::vector<Launch>& launches();
void clear_launches();
void count_bank_conflicts(bool on);  // off at first, for it takes time

// Whether launches are checked and recorded, but not run: of sizes that a test could not run. Nothing reads
// what their pointers point to then.
void set_recording_only(bool value);

// Runs body(context) once per thread; throws Error. Of several phases, all blocks run one before any runs the
// next: one launch, in which blocks meet. `kernel`: the function that body calls, by which coverage.h tells
// instantiations of one name apart.
using Body = void (*)(void* context);
void run(const void* kernel, const char* name, Dim3 grid, Dim3 block, size_t shared_bytes,
         const std::vector<Body>& phases, void* context);

// How many blocks can meet; 216 as on an A100, if two of them fit on a multiprocessor.
void set_blocks_at_once(int value);
int blocks_at_once();

// What the kernels' host code is told about the device: 90 stands for 9.0.
void set_compute_capability(int value);
int compute_capability();

}  // namespace clce::executor
