// Module vpd_fast._C: CPU operators over raw pointers. Bindings are in the other files of csrc/bindings/cpu.
#include <omp.h>

#include "bindings/cpu/support.h"
#include "isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of vpd_fast";
    m.attr("build_info") = py::dict(py::arg("version") = VPD_FAST_VERSION, py::arg("compiler") = VPD_COMPILER,
                                    py::arg("flags") = VPD_BUILD_FLAGS, py::arg("isa_levels") = VPD_ISA_LEVELS);
    m.def(
        "usable_isas",
        [] {
            std::vector<std::string> names;
            for (vpd::Isa isa : vpd::usable_isas()) names.emplace_back(vpd::isa_name(isa));
            return names;
        },
        "Instruction set levels that were compiled in and run on this machine, slowest first");
    m.def(
        "resolve_isa", [](const std::string& name) { return vpd::isa_name(vpd::resolve_isa(name)); }, py::arg("name"),
        "The level that runs for a requested name; '' means the fastest usable one");
    m.def(
        "set_threads", [](int count) { omp_set_num_threads(count); }, py::arg("count"),
        "Sets how many OpenMP threads work for the calling thread, and for no other");
    m.def(
        "release_threads", [] { omp_pause_resource_all(omp_pause_soft); },
        "Ends the OpenMP threads that wait for work of the calling thread; its next parallel region starts new ones");
    vpd::bind_attention(m);
    vpd::bind_calls(m);
    vpd::bind_gemm(m);
    vpd::bind_group_norm_affine(m);
    vpd::bind_upsample_argmax(m);
    vpd::bind_winograd_conv2d(m);
}
