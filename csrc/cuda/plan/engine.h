// The engines among which a plan chooses: an architecture, a format of numbers, and whether logits are
// bounded.
#pragma once

#include <stdexcept>

#include "backend.h"

namespace clce::cuda {

// A generation of GPUs that has kernels of its own, in a folder of its name. They also run on every later
// one.
enum class Architecture { kSm80 };

// The architecture whose kernels a device runs best, by its compute capability: 90 stands for 9.0.
inline Architecture architecture_of(int compute_capability) {
  if (compute_capability < 80) {
    throw std::runtime_error("clce_ext: its CUDA kernels need a GPU of compute capability 8.0 or later");
  }
  return Architecture::kSm80;
}

// What a plan asks of a device: its architecture, and what its kind of multiprocessor has.
struct Device {
  // In bytes: shared memory of a multiprocessor, and what of it each block takes beside its own.
  static constexpr int kHopperShared = 228 * 1024, kReservedShared = 1024;

  Architecture architecture;
  int shared_bytes;

  Device(Architecture architecture_, int shared_bytes_ = kHopperShared)
      : architecture(architecture_), shared_bytes(shared_bytes_) {}
  int blocks_at_once(int block_bytes) const { return shared_bytes / (block_bytes + kReservedShared); }
};

// How numbers are kept and multiplied.
enum class Format { kFloat32, kTf32, kFloat64, kBFloat16, kFloat16 };

inline Format format_of(const ContrastArgs& args) {
  switch (args.dtype) {
    case DType::kFloat64:
      return Format::kFloat64;
    case DType::kBFloat16:
      return Format::kBFloat16;
    case DType::kFloat16:
      return Format::kFloat16;
    case DType::kFloat32:
      break;
  }
  return args.allow_tf32 ? Format::kTf32 : Format::kFloat32;
}

struct Engine {
  Architecture architecture;
  Format format;
  bool bounded;  // are its logits? Then no maxima are kept.
  // Or are they for a temperature that lies on the device? Then it has kernels for both kinds, of which those
  // leave at once that are not wanted; `bounded` is false.
  bool temperature_decides;
};

}  // namespace clce::cuda
