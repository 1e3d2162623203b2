// Which compiled instruction set runs here.
#include <cstdlib>
#include <string_view>

#include "cpu/tile.h"

namespace clce::cpu {
namespace {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// ATEN_CPU_CAPABILITY=default|avx2|avx512 limits torch's kernels, and ours with them.
Capability capability() {
#if defined(CLCE_X86_TILES)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = variable != nullptr ? variable : "";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && limit != "avx2" && limit != "default") return Capability::kAvx512;
  if (avx2 && limit != "default") return Capability::kAvx2;
#endif
  return Capability::kBaseline;
}

template <class T>
const TileKernels<T>& select(const TileKernels<T>& baseline, [[maybe_unused]] const TileKernels<T>* avx2,
                             [[maybe_unused]] const TileKernels<T>* avx512) {
  switch (capability()) {
    case Capability::kAvx512:
      return *avx512;
    case Capability::kAvx2:
      return *avx2;
    default:
      return baseline;
  }
}

#if defined(CLCE_X86_TILES)
#define CLCE_X86(kernels) &kernels
#else
#define CLCE_X86(kernels) nullptr
#endif

}  // namespace

template <>
const TileKernels<float>& tile_kernels<float>() {
  static const TileKernels<float>& kernels =
      select(baseline::kFloat, CLCE_X86(avx2::kFloat), CLCE_X86(avx512::kFloat));
  return kernels;
}

template <>
const TileKernels<double>& tile_kernels<double>() {
  static const TileKernels<double>& kernels =
      select(baseline::kDouble, CLCE_X86(avx2::kDouble), CLCE_X86(avx512::kDouble));
  return kernels;
}

}  // namespace clce::cpu
