// Rates that tools/gpu_table.py assumes: clock, mma.sync, ldmatrix, L2, device memory, a launch, and blocks
// that meet.
//
//   rates    prints one JSON object
#include "cuda/ptx/ptx.cuh"

#include "probe.h"

#include <algorithm>

namespace ptx = clce::ptx;

namespace {

// Of the fastest of several runs, in seconds.
template <class Work>
double seconds(Work work, int runs = 7) {
  cudaEvent_t start, stop;
  probe::check(cudaEventCreate(&start), "event");
  probe::check(cudaEventCreate(&stop), "event");
  float best = 1e30f;
  for (int run = 0; run <= runs; ++run) {  // the first warms up
    probe::check(cudaEventRecord(start), "event");
    work();
    probe::check(cudaEventRecord(stop), "event");
    probe::finish("a timed run");
    float milliseconds = 0;
    probe::check(cudaEventElapsedTime(&milliseconds, start, stop), "event");
    if (run > 0) best = std::min(best, milliseconds);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return best * 1e-3;
}

// Cycles of the first multiprocessor that a thread sees while it waits for a while of the global timer.
__global__ void clock_rate(unsigned long long* out) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  const long long first = clock64();
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < 20000000ull);
  out[0] = static_cast<unsigned long long>(clock64() - first);
  out[1] = now - begin;
}

// 16 independent accumulators hide mma's latency.
constexpr int kMma = 16, kTurns = 2048;

// Operands of many bits, as real ones have: a chip that multiplies zeros stays cool and its clock high. Read
// as bfloat16, float16 or TF32 they are ordinary numbers below 2.
__device__ uint32_t operand(uint32_t i) {
  const uint32_t mixed = (threadIdx.x * 8 + i) * 2654435761u;
  return (mixed & 0x83ff83ffu) | 0x38003800u;
}

template <class Tag>
__global__ void mma_rate(float* out) {
  float sum[kMma][4] = {};
  const uint32_t x[4] = {operand(0), operand(1), operand(2), operand(3)}, y[2] = {operand(4), operand(5)};
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int i = 0; i < kMma; ++i) ptx::mma_m16n8k16(sum[i], x, y, Tag{});
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < kMma; ++i) total += sum[i][0] + sum[i][1] + sum[i][2] + sum[i][3];
  if (total == 12345.0f) out[threadIdx.x] = total;
}

__global__ void mma_tf32_rate(float* out) {
  float sum[kMma][4] = {};
  const uint32_t x[4] = {operand(0), operand(1), operand(2), operand(3)}, y[2] = {operand(4), operand(5)};
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int i = 0; i < kMma; ++i) ptx::mma_m16n8k8_tf32(sum[i], x, y);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < kMma; ++i) total += sum[i][0] + sum[i][1] + sum[i][2] + sum[i][3];
  if (total == 12345.0f) out[threadIdx.x] = total;
}

__global__ void ldmatrix_rate(uint32_t* out) {
  __shared__ __align__(16) unsigned char tile[32 * 80];
  tile[threadIdx.x] = 0;
  __syncthreads();
  uint32_t total = 0;
  for (int turn = 0; turn < kTurns; ++turn) {
    uint32_t r[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::ldmatrix_x4(r[i], tile + threadIdx.x % 32 * 80 + i * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) total ^= r[i][0] ^ r[i][1] ^ r[i][2] ^ r[i][3];
  }
  if (total == 12345u) out[threadIdx.x] = total;
}

// Loads of `kWords` words, of which `kDistinct` lanes read different ones and the others the same: as many
// cycles as lanes' bytes fill, or as different bytes do? The kernels' coefficients and labels are read so.
template <int kWords, int kDistinct>
__global__ void shared_load_rate(uint32_t* out) {
  __shared__ __align__(16) uint32_t words[1024];
  for (int i = int(threadIdx.x); i < 1024; i += int(blockDim.x)) words[i] = 0;
  __syncthreads();
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(words));
  uint32_t address = base + threadIdx.x % kDistinct * kWords * 4, total = 0;
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t r[4] = {};
      if constexpr (kWords == 1) {
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r[0]) : "r"(address + i * 512));
      } else if constexpr (kWords == 2) {
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address + i * 256));
      } else {
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address + i * 128));
      }
      total ^= r[0] ^ r[1] ^ r[2] ^ r[3];
    }
  }
  if (total == 12345u) out[threadIdx.x] = total;
}

// The exponential and the additions that a forward tile makes of a logit: the two pipes beside the tensor
// cores.
__global__ void exp2_rate(float* out) {
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = -float(threadIdx.x + unsigned(i));
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = ptx::exp2_fast(x[i]);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) total += x[i];
  if (total == 12345.0f) out[threadIdx.x] = total;
}

// Each block copies the same `bytes` into its shared memory, `turns` times, as the kernels' fills do.
__global__ void fill_rate(const unsigned char* from, size_t bytes, int turns) {
  constexpr int kPiece = 16384;
  unsigned char* const to = ptx::dynamic_shared();
  // Blocks start at different places, or all would ask one slice of L2 at once.
  size_t at = size_t(blockIdx.x) * 7919 * kPiece % bytes;
  for (int turn = 0; turn < turns; ++turn) {
    for (int i = int(threadIdx.x) * 16; i < kPiece; i += int(blockDim.x) * 16) {
      ptx::cp_async<16>(to + turn % 3 * kPiece + i, from + at + i, true);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    at = at + kPiece >= bytes ? 0 : at + kPiece;
  }
  ptx::cp_async_wait<0>();
}

__global__ void copy(const uint4* from, uint4* to, size_t count) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    to[i] = from[i];
  }
}

__global__ void nothing() {}

__global__ void meetings(int count) {
  for (int i = 0; i < count; ++i) ptx::sync_grid();
}

}  // namespace

int main() {
  cudaDeviceProp gpu{};
  probe::check(cudaGetDeviceProperties(&gpu, 0), "no CUDA device");
  const int sms = gpu.multiProcessorCount;
  const probe::Buffer<unsigned long long> counts(2);
  const probe::Buffer<float> floats(1024);
  const probe::Buffer<uint32_t> words(1024);

  clock_rate<<<1, 1>>>(counts.data());
  probe::finish("clock_rate");
  const auto clock = counts.read();
  const double hertz = double(clock[0]) / double(clock[1]) * 1e9;

  const int warps = 8, blocks = 2 * sms;  // 16 warps a multiprocessor
  const auto per_second = [&](double each, double time) { return each * warps * blocks / time; };
  const double products = double(kMma) * kTurns;
  const double bf16 = per_second(
      products * 4096, seconds([&] { mma_rate<ptx::bf16_tag><<<blocks, 32 * warps>>>(floats.data()); }));
  const double f16 = per_second(
      products * 4096, seconds([&] { mma_rate<ptx::f16_tag><<<blocks, 32 * warps>>>(floats.data()); }));
  const double tf32 =
      per_second(products * 2048, seconds([&] { mma_tf32_rate<<<blocks, 32 * warps>>>(floats.data()); }));
  const double shared =
      per_second(4.0 * 512 * kTurns, seconds([&] { ldmatrix_rate<<<blocks, 32 * warps>>>(words.data()); }));
  const double exp2 =
      per_second(8.0 * 32 * kTurns, seconds([&] { exp2_rate<<<blocks, 32 * warps>>>(floats.data()); }));

  // Loads of a warp that a multiprocessor does per second.
  const auto loads = [&](auto kernel) {
    return 8.0 * kTurns * warps * blocks / sms /
           seconds([&] { kernel<<<blocks, 32 * warps>>>(words.data()); });
  };
  std::printf(
      "{\"loads_32_distinct_8\": %.6g, \"loads_64_distinct_4\": %.6g, \"loads_64_distinct_32\": %.6g,\n",
      loads(shared_load_rate<1, 8>), loads(shared_load_rate<2, 4>), loads(shared_load_rate<2, 32>));
  std::printf(" \"loads_128_distinct_1\": %.6g,\n", loads(shared_load_rate<4, 1>));

  // 16 MiB stay in every such device's L2; 2 GiB do not.
  const size_t small = size_t(16) << 20, large = size_t(1) << 30;
  const probe::Buffer<unsigned char> source(large), target(large);
  const int turns = 2048;
  const double l2 = double(turns) * 16384 * blocks /
                    seconds([&] { fill_rate<<<blocks, 256, 3 * 16384>>>(source.data(), small, turns); });
  const double memory = 2.0 * double(large) / seconds([&] {
                          copy<<<8 * sms, 512>>>(reinterpret_cast<const uint4*>(source.data()),
                                                 reinterpret_cast<uint4*>(target.data()), large / 16);
                        });

  constexpr int kLaunches = 1000;
  const double launch = seconds([] {
                          for (int i = 0; i < kLaunches; ++i) nothing<<<1, 32>>>();
                        }) /
                        kLaunches;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  probe::check(cudaStreamCreate(&stream), "stream");
  probe::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < kLaunches; ++i) nothing<<<1, 32, 0, stream>>>();
  probe::check(cudaStreamEndCapture(stream, &graph), "capture");
  probe::check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  const double in_graph = seconds([&] { probe::check(cudaGraphLaunch(executable, 0), "graph"); }) / kLaunches;

  // As many blocks of as many threads as the forward pass of a small batch has at most.
  int count = 1000;
  void* arguments[] = {&count};
  const double meet = seconds([&] {
                        probe::check(cudaLaunchCooperativeKernel(meetings, 2 * sms, 128, arguments, 0, 0),
                                     "blocks that meet");
                      }) /
                      count;

  std::printf(
      " \"gpu\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d, \"clock\": %.6g,\n"
      " \"mma_bf16_flops\": %.6g, \"mma_f16_flops\": %.6g, \"mma_tf32_flops\": %.6g,\n"
      " \"shared_bytes\": %.6g, \"exp2_per_second\": %.6g, \"l2_bytes\": %.6g, \"memory_bytes\": %.6g,\n"
      " \"launch\": %.6g, \"launch_in_graph\": %.6g, \"meet\": %.6g}\n",
      gpu.name, gpu.major, gpu.minor, sms, hertz, bf16, f16, tf32, shared, exp2, l2, memory, launch, in_graph,
      meet);
  return 0;
}
