// The function that adds the probes to a module.
#pragma once

#include <pybind11/pybind11.h>

namespace vpd {

void bind_probes(pybind11::module_& m);

}  // namespace vpd
