// The Python module clce_ext._C: importing it registers the kernels. It tells how it was built, and its
// constants.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "backend.h"
#include "binding/devices.h"
#include "cpu/tile.h"

#define CLCE_STRING_(x) #x
#define CLCE_STRING(x) CLCE_STRING_(x)

namespace {

// Names at the places that their enumerators give; a place without a name stays None, which Python refuses.
pybind11::list names_of_rows(int count, std::initializer_list<std::pair<int, const char*>> rows) {
  pybind11::list names;
  for (int i = 0; i < count; ++i) names.append(pybind11::none());
  for (const auto& [row, name] : rows) names[row] = name;
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "How clce_ext was built, and its constants; importing it registers the kernels of "
      "torch.ops.clce_ext.*.";
  m.def("build", [] {
    pybind11::dict info;
    info["version"] = CLCE_STRING(CLCE_VERSION);
    info["torch"] = CLCE_STRING(CLCE_BUILD_TORCH);
    info["cuda"] = pybind11::none();
    info["cuda_archs"] = pybind11::list();
#if defined(CLCE_CUDA)
    info["cuda"] = CLCE_STRING(CLCE_BUILD_CUDA);
    info["cuda_archs"] = pybind11::str(CLCE_STRING(CLCE_BUILD_ARCHS)).attr("split")("+");
#endif
#if defined(CLCE_TORCH_BLAS)
    info["blas"] = "torch's sgemm/dgemm";
#else
    info["blas"] = "at::mm";
#endif
    return info;
  });
  m.def("cpu_capability", [] { return clce::cpu::tile_kernels<float>().capability; });

  m.def("use_engine", [](const std::string& name) {
    const auto choice = clce::binding::engine_named(name);
    if (!choice) throw std::invalid_argument("engine must be 'fused', 'panels' or '', got '" + name + "'");
    clce::binding::use_engine(*choice);
  });

  pybind11::list device_types;
  for (const at::DeviceType type : clce::binding::device_types()) {
    device_types.append(at::DeviceTypeName(type, /*lower_case=*/true));
  }
  m.attr("DEVICE_TYPES") = device_types;
#if defined(CLCE_CUDA)
  m.attr("ENGINES") = pybind11::make_tuple("fused", "panels");
#else
  m.attr("ENGINES") = pybind11::make_tuple("fused");
#endif

  // clce_ext has these in Python too, where nothing may be compiled; a test compares them.
  m.attr("NORM_EPS") = clce::kNormEps;
  m.attr("BOUNDED_LOGIT") = clce::kBoundedLogit;
  m.attr("ROW_PADDING") = clce::kRowPadding;
  m.attr("STATISTICS") = names_of_rows(clce::kNumStatistics, {{clce::kNumPos, "n_pos"},
                                                              {clce::kNumNeg, "n_neg"},
                                                              {clce::kSumPos, "sum_pos"},
                                                              {clce::kLsePos, "lse_pos"},
                                                              {clce::kLseW, "lse_w"},
                                                              {clce::kLseWn, "lse_wn"},
                                                              {clce::kLsePosLow, "lse_pos_low"},
                                                              {clce::kLseWLow, "lse_w_low"},
                                                              {clce::kLseWnLow, "lse_wn_low"}});
  m.attr("DERIVATIVES") = names_of_rows(clce::kNumDerivatives, {{clce::kDSumPos, "sum_pos"},
                                                                {clce::kDLsePos, "lse_pos"},
                                                                {clce::kDLseW, "lse_w"},
                                                                {clce::kDLseWn, "lse_wn"},
                                                                {clce::kDScale, "scale"}});
}
