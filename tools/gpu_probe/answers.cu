// Bits: what a chip answers to the questions.
//
//   answers FOLDER    writes FOLDER/*.bin
#include "probe.h"

#include "questions.cuh"

namespace {

using namespace probe;

template <class Function>
__global__ void sum_all(unsigned long long* sums) {
  const uint32_t upper = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(sums + upper / kUppersOfSum, sum_of<Function>(upper));
}

__global__ void find_errors(unsigned long long* worst) {
  const uint32_t upper = blockIdx.x * blockDim.x + threadIdx.x;
  double top = 0;
  for (uint32_t lower = 0; lower < 65536; ++lower) {
    const double error = exp2_error(number_of(upper << 16 | lower));
    if (error > top) top = error;
  }
  // The bits of positive doubles are in their order.
  atomicMax(worst + upper / kUppersOfError, static_cast<unsigned long long>(__double_as_longlong(top)));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: answers FOLDER\n");
    return 2;
  }
  const std::string folder = arguments[1];
  try {
    ask<Buffer>(folder);
    for_each_function([&](auto function) {
      const Buffer<unsigned long long> sums(kSums);
      sum_all<decltype(function)><<<kUppers / 256, 256>>>(sums.data());
      finish(function.kName);
      write(folder, std::string(function.kName) + "_sums", sums.read());
    });
    const Buffer<unsigned long long> worst(kErrors);
    find_errors<<<kUppers / 256, 256>>>(worst.data());
    finish(kExp2Errors);
    write(folder, kExp2Errors, worst.read());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_probe: %s\n", error.what());
    return 1;
  }
  return 0;
}
