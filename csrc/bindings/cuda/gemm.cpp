// Binding of the GEMM.
#include "cuda/gemm.h"

#include "cuda/gemm_narrow.h"

#include "bindings/cuda/cuda_support.h"

namespace vpd {
namespace {

using Strides = std::array<int64_t, 3>;
using Source = std::tuple<uintptr_t, Strides, int64_t>;
using Image = std::tuple<uintptr_t, std::string, Strides>;
using Statistics = std::tuple<uintptr_t, int64_t, int64_t>;
using Rounding = std::array<uintptr_t, 2>;

CudaActivation parse_activation(const std::string& name) {
    if (name.empty()) return CudaActivation::none;
    if (name == "relu") return CudaActivation::relu;
    if (name == "silu") return CudaActivation::silu;
    if (name == "geglu") return CudaActivation::geglu;
    throw std::invalid_argument("activation '" + name + "' is not '', relu, silu or geglu");
}

CudaInstructions parse_instructions(const std::string& name) {
    if (name == "auto") return CudaInstructions::automatic;
    if (name == "mma") return CudaInstructions::mma;
    if (name == "wgmma") return CudaInstructions::wgmma;
    if (name == "wgmma_wide") return CudaInstructions::wgmma_wide;
    if (name == "wgmma_persistent") return CudaInstructions::wgmma_persistent;
    if (name == "wgmma_cluster") return CudaInstructions::wgmma_cluster;
    throw std::invalid_argument("instructions '" + name +
                                "' are not auto, mma, wgmma, wgmma_wide, wgmma_persistent or wgmma_cluster");
}

CudaPositions positions(uintptr_t address, const Strides& s) {
    return {reinterpret_cast<void*>(address), s[0], s[1], s[2]};
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

struct Call {
    CudaGemm problem{};
    CudaOperand operand;
    CudaInstructions instructions;

    Call(const std::vector<Source>& sources, const std::string& dtype, const std::array<int64_t, 5>& shape,
         const std::array<int64_t, 5>& geometry, uintptr_t weight, int64_t n, const std::array<uintptr_t, 4>& scales,
         bool scale_per_image, uintptr_t bias, const std::string& activation, const std::optional<Image>& residual,
         const Image& out, const std::string& instructions_, const std::optional<Statistics>& statistics,
         const std::optional<Rounding>& rounding)
        : operand(parse_operand(dtype)), instructions(parse_instructions(instructions_)) {
        CudaGemm& p = problem;
        if (sources.empty() || sources.size() > 2) throw std::invalid_argument("there must be one or two sources");
        for (size_t i = 0; i < sources.size(); ++i) {
            p.source[i] = positions(std::get<0>(sources[i]), std::get<1>(sources[i]));
            p.channels[i] = std::get<2>(sources[i]);
        }
        std::tie(p.batch, p.height, p.width, p.out_height, p.out_width) = std::tuple_cat(shape);
        std::tie(p.kernel_height, p.kernel_width, p.stride, p.top, p.left) = std::tuple_cat(geometry);
        p.weight = reinterpret_cast<const void*>(weight), p.n = n;
        p.row_scales = floats(scales[0]), p.row_zeros = floats(scales[1]);
        p.column_scales = floats(scales[2]), p.weight_sums = floats(scales[3]);
        p.scale_per_image = scale_per_image, p.bias = floats(bias), p.activation = parse_activation(activation);
        p.out = positions(std::get<0>(out), std::get<2>(out));
        if (rounding.has_value() != (std::get<1>(out) == "int8"))
            throw std::invalid_argument("a result of int8, and only that, has a rounding");
        if (rounding)
            p.round_factors = floats((*rounding)[0]), p.round_shifts = floats((*rounding)[1]);
        else
            p.out_dtype = parse_dtype(std::get<1>(out));
        if (residual) {
            p.residual = positions(std::get<0>(*residual), std::get<2>(*residual));
            p.residual_dtype = parse_dtype(std::get<1>(*residual));
        }
        if (statistics) {
            p.statistics = reinterpret_cast<float*>(std::get<0>(*statistics));
            std::tie(std::ignore, p.statistics_image, p.run) = *statistics;
        }
    }

    void require_possible() const {
        if (const char* reason = gemm_cuda_refuses(problem, operand, instructions)) throw std::invalid_argument(reason);
    }
};

}  // namespace

void bind_gemm(py::module_& m) {
    py::class_<Call>(
        m, "Gemm",
        "A GEMM; csrc/cuda/gemm.h says what it computes. sources: one or two of (address, strides, channels), strides\n"
        "being those of (image, row, column) in elements. dtype: int8, float8_e4m3fn, bfloat16 or float16, of\n"
        "sources and weight. shape: (B, H, W, H', W'). geometry: kernel height, width, stride, top, left. weight:\n"
        "address. scales: addresses of row scales, row zeros, column scales and weight sums, or 0. bias: address or 0.\n"
        "residual: None or (address, dtype, strides); out likewise. instructions: auto, mma, wgmma,\n"
        "wgmma_wide, wgmma_persistent or wgmma_cluster. statistics: None or (address, stride of images, positions of a\n"
        "run). rounding: None or, for out in int8, addresses of factors and shifts of its columns. All memory must live\n"
        "until a run has ended.")
        .def(py::init<const std::vector<Source>&, const std::string&, const std::array<int64_t, 5>&,
                      const std::array<int64_t, 5>&, uintptr_t, int64_t, const std::array<uintptr_t, 4>&, bool,
                      uintptr_t, const std::string&, const std::optional<Image>&, const Image&, const std::string&,
                      const std::optional<Statistics>&, const std::optional<Rounding>&>(),
             py::arg("sources"), py::arg("dtype"), py::arg("shape"), py::arg("geometry"), py::arg("weight"),
             py::arg("n"), py::arg("scales"), py::arg("scale_per_image"), py::arg("bias"), py::arg("activation"),
             py::arg("residual"), py::arg("out"), py::arg("instructions") = "auto", py::arg("statistics") = py::none(),
             py::arg("rounding") = py::none())
        .def(
            "scratch",
            [](const Call& call, int device) {
                const DeviceGuard guard(device);
                call.require_possible();
                return gemm_cuda_scratch(call.problem, call.operand, call.instructions);
            },
            py::arg("device"), "Bytes of scratch memory that it needs there. Raises ValueError if it cannot run there.")
        .def(
            "finds_statistics",
            [](const Call& call, int device) {
                const DeviceGuard guard(device);
                return gemm_cuda_finds_statistics(call.problem, call.operand, call.instructions);
            },
            py::arg("device"), "Whether it fills the statistics there. If not, they stay as they are.")
        .def(
            "run",
            [](const Call& call, uintptr_t scratch, int device, uintptr_t stream) {
                const DeviceGuard guard(device);
                call.require_possible();
                CudaGemm p = call.problem;
                p.scratch = reinterpret_cast<void*>(scratch);
                if (!scratch && gemm_cuda_scratch(p, call.operand, call.instructions))
                    throw std::invalid_argument("scratch is missing");
                require_success(gemm_cuda(p, call.operand, call.instructions, reinterpret_cast<cudaStream_t>(stream)),
                                "product");
            },
            py::arg("scratch"), py::arg("device"), py::arg("stream"), "Enqueues it.")
        .def(
            "run_narrow",
            [](const Call& call, const std::string& source_dtype, int device, uintptr_t stream) {
                const DeviceGuard guard(device);
                if (const char* reason = gemm_narrow_cuda_refuses(call.problem, call.operand))
                    throw std::invalid_argument(reason);
                require_success(gemm_narrow_cuda(call.problem, parse_dtype(source_dtype), call.operand,
                                                 reinterpret_cast<cudaStream_t>(stream)),
                                "product of few numbers per position");
                return gemm_narrow_cuda_finds_statistics(call.problem);
            },
            py::arg("source_dtype"), py::arg("device"), py::arg("stream"),
            "Enqueues it by the kernel for few numbers per position (csrc/cuda/gemm_narrow.h), which reads a source of\n"
            "float32, bfloat16 or float16. Returns whether it fills the statistics. Raises ValueError for what it cannot\n"
            "compute.");
}

}  // namespace vpd
