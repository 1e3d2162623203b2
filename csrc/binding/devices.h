// Which backend computes on which device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include <optional>
#include <string_view>
#include <vector>

#include "backend.h"

namespace clce::binding {

// The kinds of device that this build has kernels for.
std::vector<at::DeviceType> device_types();

// A backend's functions, the stream to give them, and what they need for panels.
struct BackendOnStream : Backend {
  void* stream;
  ProductFunction product;
};

// "fused", "panels", or "" for the plan's choice; nothing for other names.
std::optional<EngineChoice> engine_named(std::string_view name);

// How the passes over pairs are computed from now on, where the device knows more than one way.
void use_engine(EngineChoice choice);
EngineChoice engine_in_use();

// The backend of the tensor's device, on that device's current stream.
BackendOnStream backend_for(const at::Tensor& tensor);

}  // namespace clce::binding
