// Which backend computes on which device.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>
#include <string_view>

#include "binding/tensors.h"

namespace clce::binding {

// A backend's functions, the stream to give them, and what they need for panels. While it lives, the tensor's
// device is the current one.
struct BackendOnDevice : Backend {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  void* stream = nullptr;
  ProductFunction product;
};

// Throws where this build has no kernels for the tensor's device.
BackendOnDevice backend_for(const Tensor& tensor);

// "fused", "panels", or "" for the plan's choice; nothing for other names.
std::optional<EngineChoice> engine_named(std::string_view name);

// What holds for all calls from now on.
struct Switches {
  EngineChoice engine = EngineChoice::kAuto;  // where the device knows more than one way
  bool allow_tf32 = false;                    // as in ContrastArgs
};
Switches switches();
void use_engine(EngineChoice choice);
void allow_tf32(bool allowed);

}  // namespace clce::binding
