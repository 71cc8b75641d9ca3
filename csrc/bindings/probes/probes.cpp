// Bindings of the probes, on the current device; csrc/cuda/probes/probes.h says what each one computes.
#include "bindings/probes/probes.h"

#include "bindings/cuda/cuda_support.h"
#include "cuda/probes/probes.h"

namespace vpd {
namespace {

using namespace probes;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

probes::Operand parse_format(const std::string& name) {
    if (name == "int8") return probes::Operand::int8;
    if (name == "float8_e4m3fn") return probes::Operand::float8_e4m3fn;
    if (name == "bfloat16") return probes::Operand::bfloat16;
    throw std::invalid_argument("dtype '" + name + "' is not int8, float8_e4m3fn or bfloat16");
}

}  // namespace

void bind_probes(py::module_& m) {
    m.def(
        "copy_boxes",
        [](uintptr_t source, int64_t region, int blocks, int cluster, int boxes, int lines, int stages,
           uintptr_t clocks, uintptr_t failed, uintptr_t stream) {
            const Copies p{at<void>(source),      region,         blocks, cluster, boxes, lines, stages,
                           at<long long>(clocks), at<int>(failed)};
            require_success(copy_boxes(p, reinterpret_cast<cudaStream_t>(stream)), "copies");
        },
        py::arg("source"), py::arg("region"), py::arg("blocks"), py::arg("cluster"), py::arg("boxes"), py::arg("lines"),
        py::arg("stages"), py::arg("clocks"), py::arg("failed"), py::arg("stream"));
    m.def(
        "multiply",
        [](const std::string& dtype, uintptr_t operands, uintptr_t source, int64_t region, int blocks, int columns,
           int steps, int copy_lines, uintptr_t sums, uintptr_t clocks, uintptr_t boxes, uintptr_t failed,
           uintptr_t stream) {
            const Products p{
                at<void>(operands), at<void>(source),      region,         blocks,         columns, steps, copy_lines,
                at<float>(sums),    at<long long>(clocks), at<int>(boxes), at<int>(failed)};
            require_success(multiply(p, parse_format(dtype), reinterpret_cast<cudaStream_t>(stream)), "products");
        },
        py::arg("dtype"), py::arg("operands"), py::arg("source"), py::arg("region"), py::arg("blocks"),
        py::arg("columns"), py::arg("steps"), py::arg("copy_lines"), py::arg("sums"), py::arg("clocks"),
        py::arg("boxes"), py::arg("failed"), py::arg("stream"));
    m.def(
        "multiply_tiles",
        [](uintptr_t left, uintptr_t right, int cases, int lines, uintptr_t starts, uintptr_t aparts, uintptr_t offsets,
           uintptr_t sums, uintptr_t stream) {
            const Tiles p{at<int8_t>(left), at<int8_t>(right), cases, lines, at<int>(starts), at<int>(aparts),
                          at<int>(offsets), at<int32_t>(sums)};
            require_success(multiply_tiles(p, reinterpret_cast<cudaStream_t>(stream)), "tiles");
        },
        py::arg("left"), py::arg("right"), py::arg("cases"), py::arg("lines"), py::arg("starts"), py::arg("aparts"),
        py::arg("offsets"), py::arg("sums"), py::arg("stream"));
    m.def(
        "launch_many",
        [](uintptr_t weights, int64_t bytes, int count, int blocks, bool adds, bool dependent, uintptr_t numbers,
           uintptr_t stream) {
            const Launches p{at<void>(weights), bytes, count, blocks, adds, dependent, at<int>(numbers)};
            require_success(launch_many(p, reinterpret_cast<cudaStream_t>(stream)), "launches");
        },
        py::arg("weights"), py::arg("bytes"), py::arg("count"), py::arg("blocks"), py::arg("adds"),
        py::arg("dependent"), py::arg("numbers"), py::arg("stream"));
}

}  // namespace vpd
