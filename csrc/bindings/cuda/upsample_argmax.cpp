// Binding of upsample_argmax.
#include "cuda/upsample_argmax.h"

#include "bindings/cuda/cuda_support.h"

namespace vpd {
namespace {

using WeightAddresses = std::tuple<uintptr_t, uintptr_t>;

CudaResamplingWeights parse_weights(const WeightAddresses& taps) {
    return {reinterpret_cast<const int32_t*>(std::get<0>(taps)), reinterpret_cast<const float*>(std::get<1>(taps))};
}

void upsample_argmax(uintptr_t logits, const std::string& dtype, const std::array<int64_t, 6>& shape,
                     const std::array<int64_t, 6>& strides, uintptr_t labels, const std::array<int64_t, 2>& size,
                     const WeightAddresses& rows, const WeightAddresses& columns, int taps, int device,
                     uintptr_t stream) {
    if (shape[3] > INT32_MAX) throw std::invalid_argument("too many channels");
    CudaUpsampleArgmax p{};
    p.logits = reinterpret_cast<const void*>(logits);
    std::tie(p.batch, p.grid_y, p.grid_x, p.channels, p.h, p.w) = std::tuple_cat(shape);
    std::tie(p.stride_batch, p.stride_grid_y, p.stride_grid_x, p.stride_channel, p.stride_row, p.stride_column) =
        std::tuple_cat(strides);
    p.labels = reinterpret_cast<int64_t*>(labels);
    std::tie(p.out_h, p.out_w) = std::tuple_cat(size);
    p.rows = parse_weights(rows), p.columns = parse_weights(columns), p.taps = taps;
    const DeviceGuard guard(device);
    require_success(upsample_argmax_cuda(p, parse_dtype(dtype), reinterpret_cast<cudaStream_t>(stream)),
                    "upsample_argmax");
}

}  // namespace

void bind_upsample_argmax(py::module_& m) {
    m.def(
        "upsample_argmax", &upsample_argmax, py::arg("logits"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
        py::arg("labels"), py::arg("size"), py::arg("rows"), py::arg("columns"), py::arg("taps"), py::arg("device"),
        py::arg("stream"),
        "logits: address of (batch, grid_y, grid_x, channels, h, w) with strides in elements; labels: address of\n"
        "contiguous int64 (batch, *size); rows, columns: addresses of int32 sources and float32 weights, `taps` (2, 4 or\n"
        "8) for each output row or column.");
}

}  // namespace vpd
