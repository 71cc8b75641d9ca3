// Binding of cross_attention_maps: checks sizes, chooses the tile, and shares packing and tiles among threads.
#include "cpu/cross_attention_maps.h"

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

using Strided = std::tuple<uintptr_t, std::array<int64_t, 4>>;  // address, strides

constexpr int64_t MAX_TILE_FLOATS = 128 << 10;  // of scores and their sums, which should stay in the second cache level
constexpr int64_t MAX_HEAD_FLOATS = 64 << 10;   // of K and V; larger heads are read from the third level for each tile

// Queries of a tile: enough to reuse each load of K and V, few enough for the cache and to give every thread work.
int64_t choose_tile(const CrossAttentionMapsPlan& plan, int threads) {
    const int64_t wanted = 2 * plan.tokens * plan.dim > MAX_HEAD_FLOATS ? MAX_TILE_QUERIES : MAX_TILE_QUERIES / 2;
    const int64_t fits = MAX_TILE_FLOATS / (2 * plan.tokens);
    const int64_t per_thread = plan.batch * plan.queries / (2 * std::max(threads, 1));
    return std::max(LANES, std::min({wanted, fits, per_thread}) / LANES * LANES);
}

void cross_attention_maps(const std::array<uintptr_t, 4>& addresses, const std::string& dtype,
                          const std::array<int64_t, 5>& shape, const std::array<std::array<int64_t, 2>, 3>& strides,
                          const std::optional<Strided>& maps, const std::optional<Strided>& addend,
                          const std::optional<std::tuple<uintptr_t, uintptr_t>>& categories, int64_t n_maps,
                          bool average_heads, float scale, float weight, int threads, const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    require(std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size > 0; }), "sizes must be positive");
    CrossAttentionMapsPlan plan{};
    plan.q = reinterpret_cast<const void*>(addresses[0]), plan.k = reinterpret_cast<const void*>(addresses[1]);
    plan.v = reinterpret_cast<const void*>(addresses[2]), plan.out = reinterpret_cast<void*>(addresses[3]);
    plan.bf16 = is_bf16(dtype);
    std::tie(plan.batch, plan.queries, plan.tokens, plan.heads, plan.dim) = std::tuple_cat(shape);
    std::copy(strides[0].begin(), strides[0].end(), plan.q_stride);
    std::copy(strides[1].begin(), strides[1].end(), plan.k_stride);
    std::copy(strides[2].begin(), strides[2].end(), plan.v_stride);
    if (maps) {
        plan.maps = reinterpret_cast<float*>(std::get<0>(*maps));
        std::copy(std::get<1>(*maps).begin(), std::get<1>(*maps).end(), plan.maps_stride);
        plan.n_maps = n_maps;
    }
    if (addend) {
        plan.addend = reinterpret_cast<const float*>(std::get<0>(*addend));
        std::copy(std::get<1>(*addend).begin(), std::get<1>(*addend).end(), plan.addend_stride);
    }
    if (categories) {
        plan.category_ids = reinterpret_cast<const int32_t*>(std::get<0>(*categories));
        plan.category_weights = reinterpret_cast<const float*>(std::get<1>(*categories));
    }
    plan.average_heads = average_heads, plan.scale = scale, plan.weight = weight;
    plan.contexts = plan.k_stride[0] || plan.v_stride[0] ? plan.batch : 1;
    if (plan.bf16) plan.packed_size = 2 * plan.dim * plan.tokens;
    plan.tile = choose_tile(plan, threads);
    plan.tiles = ceil_divide(plan.queries, plan.tile);

    const int64_t contexts = plan.contexts * plan.heads, tiles = plan.batch * plan.tiles;
    const int64_t per_thread = padded(cross_attention_maps_scratch(plan));
    const auto packed = allocate(contexts * plan.packed_size);
    const auto scratch = allocate(std::min<int64_t>(std::max(threads, 1), tiles) * per_thread);

    py::gil_scoped_release unlocked;
    if (plan.packed_size)
        in_parts(contexts, threads, [&](int64_t first, int64_t last, int64_t) {
            VPD_DISPATCH(isa, cross_attention_maps_pack, plan, packed.get(), first, last);
        });
    in_parts(tiles, threads, [&](int64_t first, int64_t last, int64_t part) {
        VPD_DISPATCH(isa, cross_attention_maps_tiles, plan, packed.get(), first, last,
                     scratch.get() + part * per_thread);
    });
}

}  // namespace

int64_t cross_attention_maps_scratch(const CrossAttentionMapsPlan& plan) {
    return plan.tile * (2 * plan.dim + 2 * plan.tokens + plan.n_maps + std::max(plan.dim, plan.n_maps));
}

void bind_cross_attention_maps(py::module_& m) {
    m.def(
        "cross_attention_maps", &cross_attention_maps, py::arg("addresses"), py::arg("dtype"), py::arg("shape"),
        py::arg("strides"), py::arg("maps"), py::arg("addend"), py::arg("categories"), py::arg("n_maps"),
        py::arg("average_heads"), py::arg("scale"), py::arg("weight"), py::arg("threads"), py::arg("isa") = "",
        "addresses: of q, k, v and out; dtype: theirs, float32 or bfloat16; shape: (batch, queries, tokens, heads, dim);\n"
        "strides: (image, row) of q, k and v in elements; maps, addend: (address, strides) of float32 (batch, heads or\n"
        "1, queries, n_maps), or None; categories: addresses of int32 ids (tokens) and float32 weights (n_maps), or None.");
}

}  // namespace vpd
