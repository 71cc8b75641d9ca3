// Binding of what comes before a product.
#include "cuda/prologue.h"

#include "bindings/cuda/cuda_support.h"

namespace vpd {
namespace {

using Source = std::tuple<uintptr_t, std::array<int64_t, 3>, int64_t>;

CudaRounding parse_rounding(const std::string& name) {
    if (name == "plain") return CudaRounding::plain;
    if (name == "row") return CudaRounding::row;
    if (name == "image") return CudaRounding::image;
    if (name == "range") return CudaRounding::range;
    throw std::invalid_argument("rounding '" + name + "' is not plain, row, image or range");
}

struct PrologueCall {
    CudaPrologue problem{};

    PrologueCall(const std::vector<Source>& sources, const std::string& dtype, const std::array<int64_t, 3>& shape,
                 const std::array<int64_t, 4>& padded, uintptr_t scale_shift, uintptr_t factors, bool norm, double eps,
                 bool silu, uintptr_t out, const std::string& out_dtype, uintptr_t scales, uintptr_t zeros) {
        CudaPrologue& p = problem;
        if (sources.empty() || sources.size() > 2) throw std::invalid_argument("there must be one or two sources");
        for (size_t i = 0; i < sources.size(); ++i) {
            const auto& [address, strides, channels] = sources[i];
            p.source[i] = {reinterpret_cast<void*>(address), strides[0], strides[1], strides[2]};
            p.channels[i] = channels;
        }
        std::tie(p.batch, p.height, p.width) = std::tuple_cat(shape);
        std::tie(p.top, p.left, p.tall, p.wide) = std::tuple_cat(padded);
        p.dtype = parse_dtype(dtype), p.out_dtype = parse_operand(out_dtype);
        p.scale_shift = reinterpret_cast<const float*>(scale_shift);
        p.factors = reinterpret_cast<const float*>(factors);
        p.norm = norm, p.eps = static_cast<float>(eps), p.silu = silu, p.out = reinterpret_cast<void*>(out);
        p.scales = reinterpret_cast<float*>(scales), p.zeros = reinterpret_cast<float*>(zeros);
    }
};

}  // namespace

void bind_prologue(py::module_& m) {
    py::class_<PrologueCall>(
        m, "Prologue",
        "What comes before a product; csrc/cuda/prologue.h says what it computes. sources: one or two of (address,\n"
        "strides, channels), strides being those of (image, row, column) in elements. dtype: float32, bfloat16 or\n"
        "float16, of the sources. shape: (B, H, W). padded: zeros before the first row and column, height and width with\n"
        "all zeros. scale_shift, factors: addresses or 0. out: address of (B, height, width, channels), contiguous.\n"
        "out_dtype: int8, float8_e4m3fn, bfloat16 or float16. scales, zeros: addresses or 0. All memory must live until a\n"
        "run has ended.")
        .def(py::init<const std::vector<Source>&, const std::string&, const std::array<int64_t, 3>&,
                      const std::array<int64_t, 4>&, uintptr_t, uintptr_t, bool, double, bool, uintptr_t,
                      const std::string&, uintptr_t, uintptr_t>(),
             py::arg("sources"), py::arg("dtype"), py::arg("shape"), py::arg("padded"), py::arg("scale_shift"),
             py::arg("factors"), py::arg("norm"), py::arg("eps"), py::arg("silu"), py::arg("out"), py::arg("out_dtype"),
             py::arg("scales"), py::arg("zeros"))
        .def(
            "parts",
            [](const PrologueCall& call, int device) {
                const DeviceGuard guard(device);
                return prologue_cuda_parts(call.problem);
            },
            py::arg("device"), "Parts of an image whose ranges a run with rounding \"range\" writes there.")
        .def(
            "run",
            [](const PrologueCall& call, const std::string& rounding, uintptr_t ranges, int64_t parts, int device,
               uintptr_t stream) {
                const DeviceGuard guard(device);
                CudaPrologue p = call.problem;
                p.ranges = reinterpret_cast<float*>(ranges), p.parts = parts;
                const CudaRounding how = parse_rounding(rounding);
                if (const char* reason = prologue_cuda_refuses(p, how)) throw std::invalid_argument(reason);
                require_success(prologue_cuda(p, how, reinterpret_cast<cudaStream_t>(stream)), "prologue");
            },
            py::arg("rounding"), py::arg("ranges"), py::arg("parts"), py::arg("device"), py::arg("stream"),
            "Enqueues it. rounding: plain, row, image or range. ranges: address of (B, 2, parts), or 0. Raises ValueError\n"
            "for what it cannot compute.");
}

}  // namespace vpd
