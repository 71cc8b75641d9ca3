// Module vpd_fast._C_probes: kernels that ask what the hardware does, over raw pointers and a stream. No wheel for users
// has it.
#include "bindings/probes/probes.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_probes, m) {
    m.doc() = "Kernels that ask what the hardware does";
    m.attr("build_info") = py::dict(py::arg("version") = VPD_FAST_VERSION, py::arg("compiler") = VPD_COMPILER,
                                    py::arg("archs") = VPD_CUDA_ARCHS);
    vpd::bind_probes(m);
}
