// The Python module clce_ext._C: importing it registers the ops; it tells how it was built.
#include <pybind11/pybind11.h>

#include "cpu/tile.h"

#define CLCE_STRING_(x) #x
#define CLCE_STRING(x) CLCE_STRING_(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "How clce_ext was built; importing it registers torch.ops.clce_ext.*.";
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
}
