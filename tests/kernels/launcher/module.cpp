// The launcher alone, for tests where `_C_cuda` is not built.
#include "bindings/cuda/launcher.h"

PYBIND11_MODULE(launcher, m) { vpd::bind_launcher(m); }
