// Binding of linear.
#include "cpu/linear.h"

#include "bindings/cpu/gemm_arguments.h"

namespace vpd {
namespace {

void linear(const Tensor4& x, const std::optional<Tensor4>& x2, const std::array<int64_t, 2>& shape,
            const Packed& weight, const std::array<uintptr_t, 3>& vectors, bool norm, float eps,
            const std::string& activation, const std::optional<Tensor4>& residual, const Tensor4& out, int threads,
            const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    LinearPlan plan{};
    plan.gemm = make_gemm(weight, vectors[0], shape[0], shape[1], activation, residual, out);
    plan.x[0] = make_source(x), plan.x[1] = make_source(x2);
    require(plan.x[0].channels + plan.x[1].channels == plan.gemm.k, "channels do not fit the weight");
    plan.affine = floats_at(vectors[1]), plan.smoothing = floats_at(vectors[2]);
    plan.norm = norm, plan.eps = eps;
    run_gemm(plan.gemm, isa, threads, [&](int64_t first, int64_t count, float* a, float* scratch) {
        VPD_DISPATCH(isa, linear_rows, plan, first, count, a, scratch);
    });
}

}  // namespace

void bind_linear(py::module_& m) {
    m.def(
        "linear", &linear, py::arg("x"), py::arg("x2"), py::arg("shape"), py::arg("weight"), py::arg("vectors"),
        py::arg("norm"), py::arg("eps"), py::arg("activation"), py::arg("residual"), py::arg("out"), py::arg("threads"),
        py::arg("isa") = "",
        "x, x2, residual, out: (address, dtype, channels, strides (image, row, unused)) in elements, x2 and residual may\n"
        "be None; shape: (images, rows); weight: ((data, scales, sums), dtype, n, k) as packed; vectors: addresses of\n"
        "float32 bias (n), affine (images, 2, k) and smoothing (k), 0 for none.");
}

}  // namespace vpd
