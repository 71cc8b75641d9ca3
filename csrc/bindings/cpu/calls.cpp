// Calls of kernels that are kept, to be repeated without Python.
#include "bindings/cpu/support.h"

namespace vpd {
namespace {

struct Calls {
    std::vector<std::function<void()>> kernels;
};

thread_local Calls* noting = nullptr;

void note(Calls& calls, const py::function& function) {
    struct Noting {
        Calls* before = noting;
        explicit Noting(Calls& calls) { noting = &calls; }
        ~Noting() { noting = before; }
    } scope(calls);
    function();
}

void repeat(const Calls& calls) {
    py::gil_scoped_release unlocked;
    for (const auto& kernel : calls.kernels) kernel();
}

}  // namespace

void run_unlocked(std::function<void()> kernel) {
    {
        py::gil_scoped_release unlocked;
        kernel();
    }
    if (noting) noting->kernels.push_back(std::move(kernel));
}

void bind_calls(py::module_& m) {
    py::class_<Calls>(m, "Calls", "Calls of kernels, in order. They read and write the addresses of their arguments.")
        .def(py::init<>())
        .def("note", &note, py::arg("function"), "Calls a function; the kernels that it runs in this thread are added.")
        .def("__call__", &repeat, "Repeats the calls, in this thread and without the lock of Python.")
        .def("__len__", [](const Calls& calls) { return calls.kernels.size(); });
}

}  // namespace vpd
