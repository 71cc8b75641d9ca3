// Binding of conv2d.
#include "cpu/conv2d.h"

#include "bindings/cpu/gemm_arguments.h"

namespace vpd {
namespace {

void conv2d(const Tensor4& x, const std::optional<Tensor4>& x2, const std::array<int64_t, 5>& shape,
            const std::array<int64_t, 5>& geometry, const Packed& weight, const std::array<uintptr_t, 3>& vectors,
            bool silu, const std::string& activation, const std::optional<Tensor4>& residual, const Tensor4& out,
            int threads, const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    const auto& [images, height, width, out_height, out_width] = shape;
    require(height > 0 && width > 0 && out_height > 0 && out_width > 0, "sizes must be positive");
    Conv2dPlan plan{};
    plan.gemm = make_gemm(weight, vectors[0], images, out_height * out_width, activation, residual, out);
    plan.x[0] = make_source(x), plan.x[1] = make_source(x2);
    plan.height = height, plan.width = width, plan.out_width = out_width;
    std::tie(plan.kernel_h, plan.kernel_w, plan.stride, plan.top, plan.left) = std::tuple_cat(geometry);
    require(plan.kernel_h > 0 && plan.kernel_w > 0 && plan.stride > 0, "kernel and stride must be positive");
    require((plan.x[0].channels + plan.x[1].channels) * plan.kernel_h * plan.kernel_w == plan.gemm.k,
            "channels do not fit the weight");
    plan.affine = floats_at(vectors[1]), plan.smoothing = floats_at(vectors[2]), plan.silu = silu;
    run_gemm(plan.gemm, isa, threads, [&](int64_t first, int64_t count, float* a, float* scratch) {
        VPD_DISPATCH(isa, conv2d_rows, plan, first, count, a, scratch);
    });
}

}  // namespace

void bind_conv2d(py::module_& m) {
    m.def(
        "conv2d", &conv2d, py::arg("x"), py::arg("x2"), py::arg("shape"), py::arg("geometry"), py::arg("weight"),
        py::arg("vectors"), py::arg("silu"), py::arg("activation"), py::arg("residual"), py::arg("out"),
        py::arg("threads"), py::arg("isa") = "",
        "x, x2: (address, dtype, channels, strides (image, row, column)) in elements; residual, out: likewise, with a\n"
        "stride for positions in the place of rows; x2 and residual may be None; shape: (images, height, width, height\n"
        "and width of out); geometry: (kernel height and width, stride, padding at the top and left); weight: ((data,\n"
        "scales, sums), dtype, n, k) as packed; vectors: addresses of float32 bias (n), affine (images, 2, channels) and\n"
        "smoothing (channels), 0 for none.");
}

}  // namespace vpd
