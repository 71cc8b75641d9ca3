// Binding of self_attention.
#include "cuda/self_attention.h"

#include "bindings/cuda/cuda_support.h"

namespace vpd {
namespace {

using Rows = std::tuple<uintptr_t, std::array<int64_t, 2>>;

CudaAttentionOrder parse_order(const std::string& name) {
    if (name == "auto") return CudaAttentionOrder::automatic;
    if (name == "sequential") return CudaAttentionOrder::sequential;
    if (name == "overlapped") return CudaAttentionOrder::overlapped;
    if (name == "polynomial") return CudaAttentionOrder::polynomial;
    throw std::invalid_argument("order '" + name + "' is not auto, sequential, overlapped or polynomial");
}

CudaRows parse_rows(const Rows& rows) {
    const auto& strides = std::get<1>(rows);
    return {reinterpret_cast<void*>(std::get<0>(rows)), strides[0], strides[1]};
}

void self_attention(const std::array<Rows, 4>& tensors, const std::string& dtype, const std::array<int64_t, 5>& shape,
                    double scale, const std::string& order, int groups, int device, uintptr_t stream,
                    const std::array<uintptr_t, 2>& rounding) {
    CudaSelfAttention p{};
    std::tie(p.batch, p.queries, p.keys, p.heads, p.head_dim) = std::tuple_cat(shape);
    p.q = parse_rows(tensors[0]), p.k = parse_rows(tensors[1]), p.v = parse_rows(tensors[2]);
    p.out = parse_rows(tensors[3]), p.scale = static_cast<float>(scale);
    p.round_factors = reinterpret_cast<const float*>(rounding[0]);
    p.round_shifts = reinterpret_cast<const float*>(rounding[1]);
    const CudaFloat type = parse_dtype(dtype);
    const CudaAttentionOrder chosen = parse_order(order);
    const DeviceGuard guard(device);
    if (const char* reason = self_attention_cuda_refuses(p, type, chosen)) throw std::invalid_argument(reason);
    require_success(self_attention_cuda(p, type, chosen, groups, reinterpret_cast<cudaStream_t>(stream)),
                    "self_attention");
}

}  // namespace

void bind_self_attention(py::module_& m) {
    m.def(
        "self_attention", &self_attention, py::arg("tensors"), py::arg("dtype"), py::arg("shape"), py::arg("scale"),
        py::arg("order"), py::arg("groups"), py::arg("device"), py::arg("stream"),
        py::arg("rounding") = std::array<uintptr_t, 2>{},
        "tensors: (address, strides of images and rows in elements) of q (B,N,heads*D), k and v (B,M,heads*D) and out\n"
        "(B,N,heads*D), all bfloat16 or float16 as dtype says, channels next to each other; an image's stride 0 where\n"
        "all images share k and v. shape: (B, N, M, heads, D). order: auto, sequential, overlapped or polynomial. groups:\n"
        "warpgroups per block, 1 to 3 for D up to 40, else 1 or 2; 0: chosen. rounding: addresses of factors and shifts\n"
        "(heads*D) float32 by which out becomes int8, or zeros. Raises ValueError for what it cannot compute.");
}

}  // namespace vpd
