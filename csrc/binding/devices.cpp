#include "binding/devices.h"

#include <atomic>
#include <stdexcept>

#include "binding/product.h"

#if defined(CLCE_CUDA)
// libtorch_cuda has it, of which a torch for CPUs alone has none.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace clce::binding {
namespace {

std::atomic<EngineChoice> engine{EngineChoice::kAuto};
std::atomic<bool> tf32{false};

}  // namespace

BackendOnDevice backend_for(const Tensor& tensor) {
  if (tensor.is_cpu()) return {cpu::kBackend, {}, nullptr, {}};
#if defined(CLCE_CUDA)
  if (tensor.is_cuda()) {
    const int32_t device = tensor.get_device_index();
    BackendOnDevice backend{cuda::kBackend, {}, nullptr, torch_product()};
    backend.guard.emplace(device);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &backend.stream));
    return backend;
  }
#endif
  throw std::invalid_argument("clce_ext has no kernels for this device; clce_ext.build_info() tells more");
}

std::optional<EngineChoice> engine_named(std::string_view name) {
  if (name.empty()) return EngineChoice::kAuto;
  if (name == "fused") return EngineChoice::kFused;
  if (name == "panels") return EngineChoice::kPanels;
  return {};
}

Switches switches() {
  return {engine, tf32};
}

void use_engine(EngineChoice choice) {
  engine = choice;
}

void allow_tf32(bool allowed) {
  tf32 = allowed;
}

}  // namespace clce::binding
