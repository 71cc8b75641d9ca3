// Module vpd_fast._C_cuda: CUDA operators over raw pointers and a stream. Bindings of an operator are in
// csrc/bindings/cuda/<operator>.cpp. The CUDA runtime is linked statically, so the module can be imported where there is no GPU and
// no driver; calls then fail with the runtime's message.
#include "bindings/cuda/cuda_support.h"
#include "bindings/cuda/launcher.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
    m.doc() = "CUDA kernels of vpd_fast";
    m.attr("build_info") = py::dict(py::arg("version") = VPD_FAST_VERSION, py::arg("compiler") = VPD_COMPILER,
                                    py::arg("archs") = VPD_CUDA_ARCHS);
    vpd::bind_cross_attention_maps(m);
    vpd::bind_gemm(m);
    vpd::bind_launcher(m);
    vpd::bind_prologue(m);
    vpd::bind_self_attention(m);
    vpd::bind_upsample_argmax(m);
    vpd::bind_upsample_argmax_strips(m);
}
