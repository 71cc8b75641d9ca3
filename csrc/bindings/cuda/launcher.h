// Binding of the launcher of kernels that were compiled ahead of time.
#pragma once

#include <pybind11/pybind11.h>

namespace vpd {

void bind_launcher(pybind11::module_& m);

}  // namespace vpd
