// What Python asks of the library through ctypes: how it was built, its constants, its switches.
#include <sstream>
#include <string>

#include "backend.h"
#include "binding/devices.h"
#include "cpu/gemm.h"
#include "cpu/tile.h"

#define CLCE_STRING_(x) #x
#define CLCE_STRING(x) CLCE_STRING_(x)
#define CLCE_EXPORT extern "C" [[gnu::visibility("default")]]

namespace {

const char* statistic_name(int row) {
  switch (row) {
    case clce::kNumPos:
      return "n_pos";
    case clce::kNumNeg:
      return "n_neg";
    case clce::kSumPos:
      return "sum_pos";
    case clce::kLsePos:
      return "lse_pos";
    case clce::kLseW:
      return "lse_w";
    case clce::kLseWn:
      return "lse_wn";
    case clce::kLsePosLow:
      return "lse_pos_low";
    case clce::kLseWLow:
      return "lse_w_low";
    case clce::kLseWnLow:
      return "lse_wn_low";
  }
  return "";
}

const char* derivative_name(int row) {
  switch (row) {
    case clce::kDSumPos:
      return "sum_pos";
    case clce::kDLsePos:
      return "lse_pos";
    case clce::kDLseW:
      return "lse_w";
    case clce::kDLseWn:
      return "lse_wn";
    case clce::kDScale:
      return "scale";
  }
  return "";
}

std::string list(int count, const char* (*name)(int)) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i > 0 ? ", \"" : "\"") + std::string(name(i)) + "\"";
  return "[" + text + "]";
}

std::string facts() {
  std::ostringstream json;
  json.precision(17);
  json << "{\"version\": \"" CLCE_STRING(CLCE_VERSION) "\", \"torch\": \"" CLCE_STRING(CLCE_BUILD_TORCH) "\"";
#if defined(CLCE_CUDA)
  json << ", \"cuda\": \"" CLCE_STRING(CLCE_BUILD_CUDA) "\", \"cuda_archs\": \"" CLCE_STRING(
      CLCE_BUILD_ARCHS) "\"";
#else
  json << ", \"cuda\": null, \"cuda_archs\": \"\"";
#endif
  json << ", \"blas\": \"" << (clce::cpu::has_blas() ? "torch's sgemm/dgemm" : "aten::mm") << "\"";
  json << ", \"cpu_capability\": \"" << clce::cpu::tile_kernels<float>().capability << "\"";
  json << ", \"norm_eps\": " << clce::kNormEps << ", \"bounded_logit\": " << clce::kBoundedLogit;
  json << ", \"row_padding\": " << clce::kRowPadding << ", \"largest_beta\": " << clce::kLargestBeta;
  json << ", \"statistics\": " << list(clce::kNumStatistics, statistic_name);
  json << ", \"derivatives\": " << list(clce::kNumDerivatives, derivative_name) << "}";
  return json.str();
}

}  // namespace

// JSON; clce_ext/compiled.py reads it, and tests compare its constants with those in Python.
CLCE_EXPORT const char* clce_ext_facts() {
  static const std::string text = facts();
  return text.c_str();
}

// "fused", "panels", or "" for the plan's choice; whether it knows the name.
CLCE_EXPORT bool clce_ext_use_engine(const char* name) {
  const auto choice = clce::binding::engine_named(name);
  if (choice) clce::binding::use_engine(*choice);
  return choice.has_value();
}

// Whether float32 products on a GPU may round their operands to TF32, from now on.
CLCE_EXPORT void clce_ext_allow_tf32(bool allowed) {
  clce::binding::allow_tf32(allowed);
}
