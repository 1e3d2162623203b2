#include "binding/checks.h"

#include <cmath>

namespace clce::binding {
namespace {

void check_rows(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 2, name,
                    " must have shape [rows, dim] (or, for embeddings, [images, views, dim]), got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.size(1) >= 1, name, " must have at least one column, got shape ", tensor.sizes());
}

void check_same_device(const Tensor& tensor, const char* name, const Tensor& embeddings) {
  TORCH_CHECK_VALUE(tensor.device() == embeddings.device(), name, " must be on the embeddings' device ",
                    embeddings.device(), ", got ", tensor.device());
}

void check_labels(const Tensor& labels, const char* name, int64_t length, const Tensor& embeddings) {
  TORCH_CHECK_TYPE(at::isIntegralType(labels.scalar_type(), /*includeBool=*/false), name,
                   " must be integers (class indices), got ", labels.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == length, name, " must have shape [", length,
                    "], one label per image, got ", labels.sizes());
  check_same_device(labels, name, embeddings);
}

}  // namespace

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, float64, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

at::ScalarType acc_type(DType dtype) {
  return dtype == DType::kFloat64 ? at::kDouble : at::kFloat;
}

Reduction reduction_of(std::string_view value) {
  if (value == "none") return Reduction::kNone;
  if (value == "mean") return Reduction::kMean;
  if (value == "sum") return Reduction::kSum;
  TORCH_CHECK_VALUE(false, "reduction must be 'mean', 'sum' or 'none', got '", value, "'");
}

LossOptions loss_options(double beta, std::string_view summation, std::string_view denominator, double debias,
                         bool detach_weights, std::string_view reduction) {
  TORCH_CHECK_VALUE(summation == "in" || summation == "out", "summation must be 'in' or 'out', got '",
                    summation, "'");
  TORCH_CHECK_VALUE(denominator == "all" || denominator == "negatives",
                    "denominator must be 'all' or 'negatives', got '", denominator, "'");
  TORCH_CHECK_VALUE(debias >= 0 && debias < 1, "debias must be in [0, 1), got ", debias);
  LossOptions options;
  LossConfig& config = options.config;
  config.beta = beta;
  config.debias = debias;
  config.mean_inside_log = summation == "in";
  config.negatives_only = denominator == "negatives";
  config.detach_weights = detach_weights;
  options.reduction = reduction_of(reduction);
  return options;
}

OptionalTensor debias_of_anchors(const OptionalTensor& debias, int64_t num_anchors, DType dtype,
                                 const at::Device& device) {
  if (!debias.has_value()) return {};
  TORCH_CHECK_VALUE(debias->dim() == 1 && debias->size(0) == num_anchors,
                    "debias must be a number or have shape [", num_anchors, "], one for each anchor, got ",
                    debias->sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(debias->scalar_type()), "debias must be a floating-point tensor, got ",
                   debias->scalar_type());
  TORCH_CHECK_VALUE(debias->device() == device, "debias must be on the embeddings' device ", device, ", got ",
                    debias->device());
  const Tensor numbers = debias->detach().to(acc_type(dtype)).contiguous();
  if (numbers.is_cpu()) {  // reading it elsewhere would wait for the device
    const auto check = [&](const auto* values) {
      for (int64_t i = 0; i < num_anchors; ++i) {
        TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < 1, "debias must be in [0, 1), got ", values[i],
                          " for anchor ", i);
      }
    };
    dtype == DType::kFloat64 ? check(numbers.const_data_ptr<double>())
                             : check(numbers.const_data_ptr<float>());
  }
  return numbers;
}

void check_temperature(const Temperature& temperature, const at::Device& device) {
  double value = temperature.number;
  if (const OptionalTensor& tensor = temperature.tensor) {
    TORCH_CHECK_VALUE(tensor->numel() == 1,
                      "temperature must be a number or a tensor of one element, got shape ", tensor->sizes());
    TORCH_CHECK_TYPE(at::isFloatingType(tensor->scalar_type()),
                     "temperature must be a floating-point tensor, got ", tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->device() == device, "temperature must be on the embeddings' device ", device,
                      ", got ", tensor->device());
    if (!tensor->is_cpu()) return;  // reading it would wait for the device
    value = tensor->item<double>();
  }
  TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), "temperature must be finite and greater than 0, got ",
                    value);
}

void check_contrast(const Tensor& anchors, const OptionalTensor& labels, const OptionalTensor& keys,
                    const OptionalTensor& key_labels, const ContrastOptions& options) {
  const DType dtype = dtype_of(anchors, "embeddings");
  check_rows(anchors, "embeddings");
  const int64_t rows = anchors.size(0);
  TORCH_CHECK_VALUE(options.views >= 1 && rows % options.views == 0, "views must divide the number of rows ",
                    rows, ", got ", options.views);
  const int64_t images = rows / options.views;
  if (labels.has_value()) check_labels(*labels, "labels", images, anchors);
  TORCH_CHECK_VALUE(options.beta >= 0 && std::isfinite(options.beta),
                    "beta must be finite and at least 0, got ", options.beta);
  // The gradient is a difference of terms times beta and 1 + beta, of which float32 has seven digits.
  TORCH_CHECK_VALUE(options.beta <= kLargestBeta, "beta must be at most ", kLargestBeta, ", got ",
                    options.beta);
  check_temperature(options.temperature, anchors.device());

  if (!keys.has_value()) {
    TORCH_CHECK_VALUE(!key_labels.has_value(), "key_labels are given without keys");
    TORCH_CHECK_VALUE(!options.key_offset.has_value(), "key_offset is given without keys");
    TORCH_CHECK_VALUE(labels.has_value() || options.views >= 2 || rows == 0,
                      "labels are needed unless embeddings hold at least two views per image "
                      "(shape [images, views, dim]) or keys are given, got labels=None and one view");
    return;
  }
  check_rows(*keys, "keys");
  TORCH_CHECK_TYPE(dtype_of(*keys, "keys") == dtype, "keys must have the embeddings' dtype ",
                   anchors.scalar_type(), ", got ", keys->scalar_type());
  check_same_device(*keys, "keys", anchors);
  TORCH_CHECK_VALUE(keys->size(1) == anchors.size(1), "keys must have the embeddings' ", anchors.size(1),
                    " columns, got shape ", keys->sizes());
  TORCH_CHECK_VALUE(
      labels.has_value() == key_labels.has_value(),
      "labels and key_labels must be given together (or neither: image i pairs with key i), got labels=",
      labels.has_value() ? "a tensor" : "None",
      ", key_labels=", key_labels.has_value() ? "a tensor" : "None");
  if (key_labels.has_value()) {
    check_labels(*key_labels, "key_labels", keys->size(0), anchors);
  } else {
    TORCH_CHECK_VALUE(keys->size(0) == images, "keys must have one row per image (", images,
                      ") where neither has labels, got ", keys->size(0));
    TORCH_CHECK_VALUE(!options.key_offset.has_value(), "key_offset needs labels and key_labels");
  }
  if (options.key_offset.has_value()) {
    TORCH_CHECK_VALUE(*options.key_offset >= 0 && *options.key_offset + rows <= keys->size(0),
                      "key_offset must place all ", rows, " anchors inside the ", keys->size(0),
                      " keys, got ", *options.key_offset);
  }
}

void check_prepared(const Tensor& z, const OptionalTensor& key_z, int64_t dim) {
  const auto check = [dim](const Tensor& rows, const char* name) {
    TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) == padded_dim(dim) && rows.is_contiguous(), name,
                      " must be contiguous rows as clce_ext::prepare makes them, [rows, ", padded_dim(dim),
                      "], got ", rows.sizes());
    // The kernels read 16 bytes at a time.
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0, name,
                      " must lie at a multiple of 16 bytes, as clce_ext::prepare makes it");
  };
  check(z, "z");
  if (key_z.has_value()) check(*key_z, "key_z");
}

void check_rows_of(const Tensor& z, const Tensor& tensor, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  const auto acc = acc_type(dtype_of(z, "z"));
  TORCH_CHECK_TYPE(tensor.scalar_type() == acc, name, " must be ", acc, " where z is ", z.scalar_type(),
                   ", got ", tensor.scalar_type());
  check_same_device(tensor, name, z);
}

}  // namespace clce::binding
