#include "binding/devices.h"

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <atomic>

#if defined(CLCE_CUDA)
#include <c10/cuda/CUDAStream.h>

#include "binding/product.h"
#endif

namespace clce::binding {
namespace {

struct Entry {
  at::DeviceType type;
  const Backend& backend;
  void* (*current_stream)(at::Device device);
  ProductFunction product;
};

const Entry kDevices[] = {
    {at::kCPU, cpu::kBackend, [](at::Device) -> void* { return nullptr; }, {}},
#if defined(CLCE_CUDA)
    {at::kCUDA, cuda::kBackend,
     [](at::Device device) -> void* { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); },
     torch_product()},
#endif
};

std::atomic<EngineChoice> chosen{EngineChoice::kAuto};

}  // namespace

std::vector<at::DeviceType> device_types() {
  std::vector<at::DeviceType> types;
  for (const Entry& entry : kDevices) types.push_back(entry.type);
  return types;
}

std::optional<EngineChoice> engine_named(std::string_view name) {
  if (name.empty()) return EngineChoice::kAuto;
  if (name == "fused") return EngineChoice::kFused;
  if (name == "panels") return EngineChoice::kPanels;
  return {};
}

void use_engine(EngineChoice choice) {
  chosen = choice;
}

EngineChoice engine_in_use() {
  return chosen;
}

BackendOnStream backend_for(const at::Tensor& tensor) {
  const at::Device device = tensor.device();
  for (const Entry& entry : kDevices) {
    if (entry.type == device.type()) return {entry.backend, entry.current_stream(device), entry.product};
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, "clce_ext has no kernels for ", device,
                              "; clce_ext.build_info() tells more");
}

}  // namespace clce::binding
