// Which backend computes on which device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include "backend.h"

namespace clce::binding {

// The kinds of device that the ops are registered for. CUDA is among them in builds without its kernels too,
// so that backend_for() can say what is missing.
inline constexpr at::DeviceType kDeviceTypes[] = {at::kCPU, at::kCUDA};

// A backend's functions, the stream to give them, and what they need for panels.
struct BackendOnStream : Backend {
  void* stream;
  ProductFunction product;
};

// How the passes over pairs are computed from now on, where the device knows more than one way.
void use_engine(EngineChoice choice);
EngineChoice engine_in_use();

// The backend of the tensor's device, on that device's current stream.
BackendOnStream backend_for(const at::Tensor& tensor);

}  // namespace clce::binding
