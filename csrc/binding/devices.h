// Which backend computes on which device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include <vector>

#include "backend.h"

namespace clce::binding {

// The kinds of device that this build has kernels for.
std::vector<at::DeviceType> device_types();

// A backend's functions, and the stream to give them.
struct BackendOnStream : Backend {
  void* stream;
};

// The backend of the tensor's device, on that device's current stream.
BackendOnStream backend_for(const at::Tensor& tensor);

}  // namespace clce::binding
