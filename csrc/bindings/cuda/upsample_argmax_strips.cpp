// Binding of upsample_argmax by strips.
#include "cuda/upsample_argmax_strips.h"

#include "bindings/cuda/cuda_support.h"

namespace vpd {
namespace {

using Addresses = std::tuple<uintptr_t, uintptr_t>;

CudaResamplingWeights weights_at(const Addresses& a) {
    return {reinterpret_cast<const int32_t*>(std::get<0>(a)), reinterpret_cast<const float*>(std::get<1>(a))};
}

void upsample_argmax_strips(uintptr_t logits, const std::string& dtype, const std::array<int64_t, 6>& shape,
                            const std::array<int64_t, 6>& strides, uintptr_t labels, const std::array<int64_t, 2>& size,
                            const Addresses& rows, const Addresses& columns, uintptr_t begins, int64_t strips,
                            int device, uintptr_t stream) {
    if (shape[3] > INT32_MAX) throw std::invalid_argument("too many channels");
    CudaStrips call{};
    CudaUpsampleArgmax& p = call.problem;
    p.logits = reinterpret_cast<const void*>(logits), p.labels = reinterpret_cast<int64_t*>(labels), p.taps = 2;
    std::tie(p.batch, p.grid_y, p.grid_x, p.channels, p.h, p.w) = std::tuple_cat(shape);
    std::tie(p.stride_batch, p.stride_grid_y, p.stride_grid_x, p.stride_channel, p.stride_row, p.stride_column) =
        std::tuple_cat(strides);
    std::tie(p.out_h, p.out_w) = std::tuple_cat(size);
    p.rows = weights_at(rows), p.columns = weights_at(columns);
    call.begins = reinterpret_cast<const int32_t*>(begins), call.strips = strips;
    const DeviceGuard guard(device);
    require_success(upsample_argmax_strips_cuda(call, parse_dtype(dtype), reinterpret_cast<cudaStream_t>(stream)),
                    "upsample_argmax by strips");
}

}  // namespace

void bind_upsample_argmax_strips(py::module_& m) {
    m.def(
        "upsample_argmax_strips", &upsample_argmax_strips, py::arg("logits"), py::arg("dtype"), py::arg("shape"),
        py::arg("strides"), py::arg("labels"), py::arg("size"), py::arg("rows"), py::arg("columns"), py::arg("begins"),
        py::arg("strips"), py::arg("device"), py::arg("stream"),
        "As upsample_argmax with two taps. begins: address of int32 (strips + 1): strip i has the pixels begins[i] to\n"
        "begins[i + 1] - 1 of each row, at most 8, which read the same two columns of logits.");
}

}  // namespace vpd
