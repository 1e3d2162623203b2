// One anchor with two positives and two negatives, by the formulas; and, where the kernels were built and a
// device is there, a small batch by the kernels.
#include <cmath>
#include <cstdio>
#include <vector>

#include "backend.h"

#if defined(WITH_CUDA)
#include <cuda_runtime.h>

namespace {

struct DeviceMemory {
  explicit DeviceMemory(size_t bytes) { cudaMalloc(&data, bytes > 0 ? bytes : 1); }
  ~DeviceMemory() { cudaFree(data); }
  void* data = nullptr;
};

// Mean loss of four embeddings in two classes; both positives equal, negatives orthogonal.
float loss_on_device() {
  const int64_t rows = 4, dim = 8;
  std::vector<float> x(rows * dim);
  for (int64_t r = 0; r < rows; ++r) x[r * dim + r / 2] = 1;
  const std::vector<int64_t> labels{0, 0, 1, 1};
  DeviceMemory embeddings(x.size() * 4), device_labels(rows * 8), statistics(clce::kNumStatistics * rows * 4),
      derivatives(clce::kNumDerivatives * rows * 4), loss(4), num_terms(4);
  cudaMemcpy(embeddings.data, x.data(), x.size() * 4, cudaMemcpyHostToDevice);
  cudaMemcpy(device_labels.data, labels.data(), rows * 8, cudaMemcpyHostToDevice);
  clce::ForwardArgs args;
  clce::ContrastArgs& c = args.contrast;
  c.num_anchors = c.num_keys = rows;
  c.dim = dim;
  c.stride = clce::padded_dim(dim);
  c.anchors = c.keys = embeddings.data;
  c.anchor_labels = c.key_labels = static_cast<const int64_t*>(device_labels.data);
  c.symmetric = c.has_self = true;
  c.beta = 1;
  c.bounded = true;
  args.statistics = statistics.data;
  args.with_loss = true;
  args.loss.num_anchors = rows;
  args.loss.statistics = statistics.data;
  args.loss.loss = loss.data;
  args.loss.num_terms = num_terms.data;
  args.loss.derivatives = derivatives.data;
  DeviceMemory workspace(clce::cuda::forward_workspace_bytes(c));
  args.workspace = workspace.data;
  clce::cuda::forward(args, nullptr);
  float value = NAN;
  cudaMemcpy(&value, loss.data, 4, cudaMemcpyDeviceToHost);
  return value;
}

}  // namespace
#endif

int main() {
  clce::PartialSums<double> sums;
  sums.n_pos = sums.n_neg = 2;
  sums.sum_pos = 2;
  sums.exp_pos = 2 * std::exp(1.0);
  sums.exp_w = sums.exp_wn = 2;
  clce::LossConfig config;
  const auto loss = clce::anchor_loss(clce::finalize(sums, clce::hardness(1.0)), config, 1.0);
  const double expected = std::log(2 * std::exp(1.0) + 2) - 1;
  std::printf("formulas: loss %.6f\n", loss.value);
  if (std::abs(loss.value - expected) > 1e-12) return 1;
#if defined(WITH_CUDA)
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("kernels: linked, no device to run them on\n");
    return 0;
  }
  const float found = loss_on_device();
  const double expected_mean = std::log(std::exp(1.0) + 2) - 1;  // one positive, two negatives at s = 0
  std::printf("kernels: mean loss %.6f\n", found);
  if (!(std::abs(found - expected_mean) < 1e-5)) return 1;
#endif
  return 0;
}
