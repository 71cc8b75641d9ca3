// Module vpd_fast._C_cuda: CUDA operators over raw pointers and a stream. The CUDA runtime is linked statically, so the
// module can be imported where there is no GPU and no driver; calls then fail with the runtime's message.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/upsample_argmax.h"

namespace py = pybind11;

namespace {

void require_success(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device current for the calling thread and restores the previous one.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        require_success(cudaGetDevice(&previous_), "cudaGetDevice");
        require_success(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
};

vpd::CudaFloat parse_dtype(const std::string& name) {
    if (name == "float32") return vpd::CudaFloat::float32;
    if (name == "bfloat16") return vpd::CudaFloat::bfloat16;
    if (name == "float16") return vpd::CudaFloat::float16;
    throw std::invalid_argument("dtype '" + name + "' is not float32, bfloat16 or float16");
}

using AddressOfTaps = std::tuple<uintptr_t, uintptr_t>;

vpd::CudaTaps parse_taps(const AddressOfTaps& taps) {
    return {reinterpret_cast<const int32_t*>(std::get<0>(taps)), reinterpret_cast<const float*>(std::get<1>(taps))};
}

void upsample_argmax(uintptr_t logits, const std::string& dtype, const std::array<int64_t, 6>& shape,
                     const std::array<int64_t, 6>& strides, uintptr_t labels, const std::array<int64_t, 2>& size,
                     const AddressOfTaps& rows, const AddressOfTaps& columns, int taps, int device, uintptr_t stream) {
    if (shape[3] > INT32_MAX) throw std::invalid_argument("too many channels");
    vpd::CudaUpsampleArgmax p{};
    p.logits = reinterpret_cast<const void*>(logits);
    std::tie(p.batch, p.grid_y, p.grid_x, p.channels, p.h, p.w) = std::tuple_cat(shape);
    std::tie(p.stride_batch, p.stride_grid_y, p.stride_grid_x, p.stride_channel, p.stride_row, p.stride_column) =
        std::tuple_cat(strides);
    p.labels = reinterpret_cast<int64_t*>(labels);
    std::tie(p.out_h, p.out_w) = std::tuple_cat(size);
    p.rows = parse_taps(rows), p.columns = parse_taps(columns), p.taps = taps;
    const DeviceGuard guard(device);
    require_success(vpd::upsample_argmax_cuda(p, parse_dtype(dtype), reinterpret_cast<cudaStream_t>(stream)),
                    "upsample_argmax");
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
    m.doc() = "CUDA kernels of vpd_fast";
    m.attr("build_info") = py::dict(py::arg("version") = VPD_FAST_VERSION, py::arg("compiler") = VPD_COMPILER,
                                    py::arg("archs") = VPD_CUDA_ARCHS);
    m.def("upsample_argmax", &upsample_argmax, py::arg("logits"), py::arg("dtype"), py::arg("shape"),
          py::arg("strides"), py::arg("labels"), py::arg("size"), py::arg("rows"), py::arg("columns"),
          py::arg("taps"), py::arg("device"), py::arg("stream"),
          "logits: address of (batch, grid_y, grid_x, channels, h, w) with strides in elements; labels: address of\n"
          "contiguous int64 (batch, *size); rows, columns: addresses of int32 sources and float32 weights, `taps` (2, 4 or\n"
          "8) for each output row or column.");
}
