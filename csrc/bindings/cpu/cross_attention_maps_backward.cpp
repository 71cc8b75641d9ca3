// Binding of cross_attention_maps_backward: checks sizes and shares chunks among threads.
#include "cpu/cross_attention_maps_backward.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "bindings/cpu/operators.h"
#include "bindings/cpu/support.h"

namespace vpd {
namespace {

namespace py = pybind11;

// Chunks of all heads: work for many threads. A constant, so that results do not depend on the number of threads.
constexpr int64_t MIN_ITEMS = 32;

void cross_attention_maps_backward(const std::array<uintptr_t, 3>& inputs, const std::array<int64_t, 6>& shape,
                                   const std::array<std::array<int64_t, 2>, 3>& strides,
                                   const std::optional<std::tuple<uintptr_t, std::array<int64_t, 2>>>& grad_out,
                                   const std::optional<std::tuple<uintptr_t, std::array<int64_t, 4>>>& grad_maps,
                                   const std::array<uintptr_t, 3>& grads,
                                   const std::optional<std::tuple<uintptr_t, uintptr_t>>& categories, int64_t n_maps,
                                   float scale, float weight, int threads, const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    require(std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size > 0; }), "sizes must be positive");
    CrossAttentionMapsBackwardPlan plan{};
    const auto address = [](uintptr_t value) { return reinterpret_cast<float*>(value); };
    plan.q = address(inputs[0]), plan.k = address(inputs[1]), plan.v = address(inputs[2]);
    plan.dq = address(grads[0]), plan.dk = address(grads[1]), plan.dv = address(grads[2]);
    std::tie(plan.batch, plan.contexts, plan.queries, plan.tokens, plan.heads, plan.dim) = std::tuple_cat(shape);
    require(plan.contexts == 1 || plan.contexts == plan.batch, "contexts must be 1 or the batch");
    std::copy(strides[0].begin(), strides[0].end(), plan.q_stride);
    std::copy(strides[1].begin(), strides[1].end(), plan.k_stride);
    std::copy(strides[2].begin(), strides[2].end(), plan.v_stride);
    if (grad_out) {
        plan.grad_out = address(std::get<0>(*grad_out));
        std::copy(std::get<1>(*grad_out).begin(), std::get<1>(*grad_out).end(), plan.out_stride);
    }
    if (grad_maps) {
        plan.grad_maps = address(std::get<0>(*grad_maps));
        std::copy(std::get<1>(*grad_maps).begin(), std::get<1>(*grad_maps).end(), plan.maps_stride);
        plan.n_maps = n_maps;
    }
    if (categories) {
        plan.category_ids = reinterpret_cast<const int32_t*>(std::get<0>(*categories));
        plan.category_weights = address(std::get<1>(*categories));
    }
    plan.scale = scale, plan.weight = weight;
    plan.tiles = ceil_divide(plan.queries, BACKWARD_TILE_QUERIES);
    plan.padded_dim = padded(plan.dim);
    const int64_t contexts = plan.contexts * plan.heads, tiles = plan.batch / plan.contexts * plan.tiles;
    plan.chunks = std::min(tiles, ceil_divide(MIN_ITEMS, contexts));

    const int64_t items = contexts * plan.chunks, per_thread = padded(cross_attention_maps_backward_scratch(plan));
    const auto partial = allocate(items * 2 * plan.tokens * plan.padded_dim);
    const auto scratch = allocate(std::min<int64_t>(std::max(threads, 1), items) * per_thread);

    py::gil_scoped_release unlocked;
    in_parts(items, threads, [&](int64_t first, int64_t last, int64_t part) {
        VPD_DISPATCH(isa, cross_attention_maps_backward_chunks, plan, partial.get(), first, last,
                     scratch.get() + part * per_thread);
    });
    in_parts(contexts, threads, [&](int64_t first, int64_t last, int64_t) {
        VPD_DISPATCH(isa, cross_attention_maps_backward_sum, plan, partial.get(), first, last);
    });
}

}  // namespace

int64_t cross_attention_maps_backward_scratch(const CrossAttentionMapsBackwardPlan& plan) {
    return BACKWARD_TILE_QUERIES * (2 * plan.tokens + plan.dim + 2 * plan.padded_dim + plan.n_maps);
}

void bind_cross_attention_maps_backward(py::module_& m) {
    m.def(
        "cross_attention_maps_backward", &cross_attention_maps_backward, py::arg("inputs"), py::arg("shape"),
        py::arg("strides"), py::arg("grad_out"), py::arg("grad_maps"), py::arg("grads"), py::arg("categories"),
        py::arg("n_maps"), py::arg("scale"), py::arg("weight"), py::arg("threads"), py::arg("isa") = "",
        "inputs, grads: addresses of float32 q, k, v and of their gradients, which are contiguous; shape: (batch, batch of\n"
        "k and v, queries, tokens, heads, dim); strides: (image, row) of q, k and v in elements; grad_out: (address, (image, row) strides);\n"
        "grad_maps: (address, strides) of (batch, heads or 1, queries, n_maps); both or one of them, or None; categories:\n"
        "addresses of int32 ids (tokens) and float32 weights (n_maps), or None; weight: of each head in the maps.");
}

}  // namespace vpd
