// Functions that add the operators to module _C_cuda, and helpers that their bindings share.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/device.h"
#include "cuda/gemm.h"

namespace vpd {

namespace py = pybind11;

void bind_cross_attention_maps(py::module_& m);
void bind_gemm(py::module_& m);
void bind_prologue(py::module_& m);
void bind_self_attention(py::module_& m);
void bind_upsample_argmax(py::module_& m);
void bind_upsample_argmax_strips(py::module_& m);

inline void require_success(cudaError_t status, const char* what) {
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

inline CudaFloat parse_dtype(const std::string& name) {
    if (name == "float32") return CudaFloat::float32;
    if (name == "bfloat16") return CudaFloat::bfloat16;
    if (name == "float16") return CudaFloat::float16;
    throw std::invalid_argument("dtype '" + name + "' is not float32, bfloat16 or float16");
}

inline CudaOperand parse_operand(const std::string& name) {
    if (name == "int8") return CudaOperand::int8;
    if (name == "float8_e4m3fn") return CudaOperand::float8_e4m3fn;
    if (name == "bfloat16") return CudaOperand::bfloat16;
    if (name == "float16") return CudaOperand::float16;
    throw std::invalid_argument("dtype '" + name + "' is not int8, float8_e4m3fn, bfloat16 or float16");
}

}  // namespace vpd
