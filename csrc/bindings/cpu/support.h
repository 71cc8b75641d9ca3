// Functions that add the operators to module _C, and helpers of their bindings: argument checks, scratch memory, and the
// division of work among threads.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "sizes.h"

namespace vpd {

namespace py = pybind11;

void bind_attention(py::module_& m);
void bind_calls(py::module_& m);
void bind_gemm(py::module_& m);
void bind_group_norm_affine(py::module_& m);
void bind_upsample_argmax(py::module_& m);
void bind_winograd_conv2d(py::module_& m);

// Runs a kernel without the lock of Python; within Calls.note it is also kept, to be run again.
void run_unlocked(std::function<void()> kernel);

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

inline bool is_bf16(const std::string& dtype) {
    require(dtype == "float32" || dtype == "bfloat16", "dtype must be float32 or bfloat16");
    return dtype == "bfloat16";
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};

// Returns uninitialised memory, aligned to 64 bytes.
inline std::unique_ptr<float[], Free> allocate(int64_t floats) {
    const size_t bytes = static_cast<size_t>(padded(floats)) * sizeof(float);
    float* memory = static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!memory) throw std::bad_alloc();
    return std::unique_ptr<float[], Free>(memory);
}

// Calls function(first, last, part) for about equal parts of `items`, one per thread.
template <typename Function>
void in_parts(int64_t items, int64_t threads, Function function) {
    const int64_t parts = std::max<int64_t>(1, std::min(threads, items));
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) function(items * part / parts, items * (part + 1) / parts, part);
}

// Calls function(first, last, scratch), where `scratch` has room for so many floats and is aligned to 64 bytes.
template <typename Function>
void in_parts(int64_t items, int64_t threads, int64_t scratch_floats, Function function) {
    const int64_t size = padded(scratch_floats);
    const auto scratch = allocate(std::max<int64_t>(1, std::min(threads, items)) * size);
    in_parts(items, threads,
             [&](int64_t first, int64_t last, int64_t part) { function(first, last, scratch.get() + part * size); });
}

}  // namespace vpd
