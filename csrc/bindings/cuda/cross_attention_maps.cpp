// Binding of cross_attention_maps.
#include "cuda/cross_attention_maps.h"

#include "cuda/cross_attention_maps_wgmma.h"

#include "bindings/cuda/cuda_support.h"

namespace vpd {
namespace {

using Shape = std::array<int64_t, 5>;
using Maps = std::tuple<uintptr_t, std::string, std::array<int64_t, 4>>;
using Addend = std::tuple<uintptr_t, std::array<int64_t, 4>>;
using Categories = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>;

CudaSchedule parse_schedule(const std::string& name) {
    if (name == "auto") return CudaSchedule::automatic;
    if (name == "heads_loop") return CudaSchedule::heads_loop;
    if (name == "cluster") return CudaSchedule::cluster;
    if (name == "split") return CudaSchedule::split;
    throw std::invalid_argument("schedule '" + name + "' is not auto, heads_loop, cluster or split");
}

CudaCrossAttentionMaps with_shape(const Shape& shape) {
    CudaCrossAttentionMaps p{};
    std::tie(p.batch, p.queries, p.tokens, p.heads, p.head_dim) = std::tuple_cat(shape);
    return p;
}

CudaMapStrides parse_strides(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

// All but where scratch memory is.
CudaCrossAttentionMaps parse_problem(const std::array<uintptr_t, 4>& tensors, const Shape& shape,
                                     const std::array<std::array<int64_t, 2>, 3>& strides,
                                     const std::optional<Maps>& maps, const std::optional<Addend>& addend,
                                     const std::optional<Categories>& categories, bool average_heads, double scale,
                                     double weight) {
    CudaCrossAttentionMaps p = with_shape(shape);
    p.q = reinterpret_cast<const void*>(tensors[0]), p.k = reinterpret_cast<const void*>(tensors[1]);
    p.v = reinterpret_cast<const void*>(tensors[2]), p.out = reinterpret_cast<void*>(tensors[3]);
    p.q_image = strides[0][0], p.q_row = strides[0][1];
    p.k_image = strides[1][0], p.k_row = strides[1][1];
    p.v_image = strides[2][0], p.v_row = strides[2][1];
    if (maps) {
        p.maps = reinterpret_cast<void*>(std::get<0>(*maps));
        p.maps_dtype = parse_dtype(std::get<1>(*maps)), p.maps_strides = parse_strides(std::get<2>(*maps));
    }
    if (addend) {
        p.addend = reinterpret_cast<const float*>(std::get<0>(*addend));
        p.addend_strides = parse_strides(std::get<1>(*addend));
    }
    if (categories) {
        p.category_tokens = reinterpret_cast<const int32_t*>(std::get<0>(*categories));
        p.category_offsets = reinterpret_cast<const int32_t*>(std::get<1>(*categories));
        p.category_weights = reinterpret_cast<const float*>(std::get<2>(*categories));
        p.categories = std::get<3>(*categories);
    }
    p.scale = static_cast<float>(scale), p.weight = static_cast<float>(weight), p.average_heads = average_heads;
    return p;
}

void cross_attention_maps(const std::array<uintptr_t, 4>& tensors, const std::string& dtype, const Shape& shape,
                          const std::array<std::array<int64_t, 2>, 3>& strides, const std::optional<Maps>& maps,
                          const std::optional<Addend>& addend, const std::optional<Categories>& categories,
                          bool average_heads, double scale, double weight, const std::string& schedule,
                          uintptr_t scratch, int device, uintptr_t stream) {
    CudaCrossAttentionMaps p =
        parse_problem(tensors, shape, strides, maps, addend, categories, average_heads, scale, weight);
    p.scratch = reinterpret_cast<void*>(scratch);

    const CudaFloat type = parse_dtype(dtype);
    const CudaSchedule chosen = parse_schedule(schedule);
    const DeviceGuard guard(device);
    if (const char* reason = cross_attention_maps_cuda_refuses(p, type, chosen)) throw std::invalid_argument(reason);
    if (!p.scratch && cross_attention_maps_cuda_scratch(p, type, chosen))
        throw std::invalid_argument("scratch is missing");
    require_success(cross_attention_maps_cuda(p, type, chosen, reinterpret_cast<cudaStream_t>(stream)),
                    "cross_attention_maps");
}

void cross_attention_maps_by_wgmma(const std::array<uintptr_t, 4>& tensors, const std::string& dtype,
                                   const Shape& shape, const std::array<std::array<int64_t, 2>, 3>& strides,
                                   const std::optional<Maps>& maps, const std::optional<Addend>& addend,
                                   const std::optional<Categories>& categories, bool average_heads, double scale,
                                   double weight, const std::string& schedule, int warpgroups, int device,
                                   uintptr_t stream) {
    const CudaCrossAttentionMaps p =
        parse_problem(tensors, shape, strides, maps, addend, categories, average_heads, scale, weight);
    const CudaFloat type = parse_dtype(dtype);
    const CudaSchedule chosen = parse_schedule(schedule);
    const DeviceGuard guard(device);
    if (const char* reason = cross_attention_maps_wgmma_refuses(p, type, chosen)) throw std::invalid_argument(reason);
    require_success(cross_attention_maps_wgmma(p, type, chosen, warpgroups, reinterpret_cast<cudaStream_t>(stream)),
                    "cross_attention_maps_wgmma");
}

int64_t cross_attention_maps_scratch(const std::string& dtype, const Shape& shape, bool maps, bool average_heads,
                                     const std::string& schedule, int device) {
    CudaCrossAttentionMaps p = with_shape(shape);
    p.maps = maps ? &p : nullptr, p.average_heads = average_heads;
    const CudaFloat type = parse_dtype(dtype);
    const CudaSchedule chosen = parse_schedule(schedule);
    const DeviceGuard guard(device);
    if (const char* reason = cross_attention_maps_cuda_refuses(p, type, chosen)) throw std::invalid_argument(reason);
    return cross_attention_maps_cuda_scratch(p, type, chosen);
}

}  // namespace

void bind_cross_attention_maps(py::module_& m) {
    m.def(
        "cross_attention_maps", &cross_attention_maps, py::arg("tensors"), py::arg("dtype"), py::arg("shape"),
        py::arg("strides"), py::arg("maps"), py::arg("addend"), py::arg("categories"), py::arg("average_heads"),
        py::arg("scale"), py::arg("weight"), py::arg("schedule"), py::arg("scratch"), py::arg("device"),
        py::arg("stream"),
        "tensors: addresses of q (B,N,heads*D), k and v (B,L,heads*D), out (B,N,heads*D), all bfloat16 or float16 as\n"
        "dtype says. shape: (B, N, L, heads, D). strides: (image, row) of q, k and v in elements, an image's 0 where all\n"
        "images share the tokens; out is contiguous. maps: None or (address, dtype, strides), strides being those of\n"
        "(image, head, query, column) in elements; head's is not used when average_heads. addend: None or (address,\n"
        "strides) of float32, may be the memory of maps. categories: None or (addresses of int32 tokens, int32 offsets\n"
        "and float32 weights, count). schedule: auto, heads_loop, cluster or split. scratch: address of\n"
        "cross_attention_maps_scratch() bytes, or 0 if that is 0. Raises ValueError for what it cannot compute.");
    m.def(
        "cross_attention_maps_wgmma", &cross_attention_maps_by_wgmma, py::arg("tensors"), py::arg("dtype"),
        py::arg("shape"), py::arg("strides"), py::arg("maps"), py::arg("addend"), py::arg("categories"),
        py::arg("average_heads"), py::arg("scale"), py::arg("weight"), py::arg("schedule"), py::arg("warpgroups"),
        py::arg("device"), py::arg("stream"),
        "The same with wgmma and TMA, for up to 160 tokens: maps are wanted, and the schedule is not split. warpgroups: of\n"
        "a block, 1 or 2; 0: chosen.");
    m.def("cross_attention_maps_scratch", &cross_attention_maps_scratch, py::arg("dtype"), py::arg("shape"),
          py::arg("maps"), py::arg("average_heads"), py::arg("schedule"), py::arg("device"),
          "Bytes of scratch memory that a call with the same arguments needs; maps: whether any are wanted. Raises\n"
          "ValueError if no call of these sizes can run on the device.");
}

}  // namespace vpd
