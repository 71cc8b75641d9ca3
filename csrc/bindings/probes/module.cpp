// Module vpd_fast._C_probes: kernels that ask what the hardware does, over raw pointers and a stream. No wheel for users
// has it.
#include "bindings/probes/probes.h"

PYBIND11_MODULE(_C_probes, m) {
    m.doc() = "Kernels that ask what the hardware does";
    vpd::bind_probes(m);
}
