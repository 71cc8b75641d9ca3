// Bindings of self_attention, cross_attention_maps and its backward: check sizes, choose tiles, and share the work among
// threads.
#include "bindings/cpu/support.h"
#include "cpu/cross_attention_maps.h"
#include "cpu/cross_attention_maps_backward.h"
#include "cpu/self_attention.h"

namespace vpd {
namespace {

template <size_t RANK>
using Strided = std::optional<std::tuple<uintptr_t, std::array<int64_t, RANK>>>;  // address, strides
using Categories = std::optional<std::tuple<uintptr_t, uintptr_t>>;               // addresses of ids and weights

constexpr int64_t MAX_TILE_FLOATS = 128 << 10;  // of scores and their sums, which should stay in the second cache level
constexpr int64_t MAX_HEAD_FLOATS = 64 << 10;   // of K and V; larger heads are read from the third level for each tile
// Chunks of all heads: work for many threads. A constant, so that results do not depend on the number of threads.
constexpr int64_t MIN_BACKWARD_ITEMS = 32;

template <typename T, size_t RANK>
void set_tensor(const Strided<RANK>& tensor, T*& data, int64_t (&stride)[RANK]) {
    if (!tensor) return;
    data = reinterpret_cast<T*>(std::get<0>(*tensor));
    std::copy_n(std::get<1>(*tensor).begin(), RANK, stride);
}

// Sets q, k and v, the first three of the addresses and of the strides, after a check of the sizes.
template <typename Plan, size_t ADDRESSES, size_t SIZES, size_t STRIDES>
void set_inputs(Plan& plan, const std::array<uintptr_t, ADDRESSES>& addresses, const std::array<int64_t, SIZES>& shape,
                const std::array<std::array<int64_t, 2>, STRIDES>& strides) {
    require(std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size > 0; }), "sizes must be positive");
    set_tensor(Strided<2>({addresses[0], strides[0]}), plan.q, plan.q_stride);
    set_tensor(Strided<2>({addresses[1], strides[1]}), plan.k, plan.k_stride);
    set_tensor(Strided<2>({addresses[2], strides[2]}), plan.v, plan.v_stride);
}

template <typename Plan>
void set_categories(Plan& plan, const Categories& categories) {
    if (!categories) return;
    plan.category_ids = reinterpret_cast<const int32_t*>(std::get<0>(*categories));
    plan.category_weights = reinterpret_cast<const float*>(std::get<1>(*categories));
}

void self_attention(const std::array<uintptr_t, 4>& addresses, const std::string& dtype,
                    const std::array<int64_t, 6>& shape, const std::array<std::array<int64_t, 2>, 4>& strides,
                    float scale, int threads, const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    SelfAttentionPlan plan{};
    set_inputs(plan, addresses, shape, strides);
    set_tensor(Strided<2>({addresses[3], strides[3]}), plan.out, plan.out_stride);
    plan.bf16 = is_bf16(dtype);
    std::tie(plan.batch, plan.contexts, plan.queries, plan.tokens, plan.heads, plan.dim) = std::tuple_cat(shape);
    require(plan.contexts == 1 || plan.contexts == plan.batch, "contexts must be 1 or batch");
    plan.scale = scale;

    const SelfAttentionSizes sizes = VPD_DISPATCH(isa, self_attention_sizes, plan);
    const int64_t contexts = plan.contexts * plan.heads;
    const int64_t parts = plan.batch * plan.heads * (ceil_divide(plan.queries, sizes.queries));
    const int64_t per_thread = padded(sizes.scratch);
    const auto packed = allocate(contexts * sizes.packed);
    const auto scratch = allocate(std::min<int64_t>(std::max(threads, 1), parts) * per_thread);

    py::gil_scoped_release unlocked;
    in_parts(contexts, threads, [&](int64_t first, int64_t last, int64_t) {
        VPD_DISPATCH(isa, self_attention_pack, plan, packed.get(), first, last);
    });
    in_parts(parts, threads, [&](int64_t first, int64_t last, int64_t part) {
        VPD_DISPATCH(isa, self_attention_parts, plan, packed.get(), first, last, scratch.get() + part * per_thread);
    });
}

// Queries of a tile: enough to reuse each load of K and V, few enough for the cache and to give every thread work.
int64_t choose_tile(const CrossAttentionMapsPlan& plan, int threads) {
    const int64_t wanted = 2 * plan.tokens * plan.dim > MAX_HEAD_FLOATS ? MAX_TILE_QUERIES : MAX_TILE_QUERIES / 2;
    const int64_t fits = MAX_TILE_FLOATS / (2 * plan.tokens);
    const int64_t per_thread = plan.batch * plan.queries / (2 * std::max(threads, 1));
    return std::max(LANES, std::min({wanted, fits, per_thread}) / LANES * LANES);
}

void cross_attention_maps(const std::array<uintptr_t, 4>& addresses, const std::string& dtype,
                          const std::array<int64_t, 5>& shape, const std::array<std::array<int64_t, 2>, 3>& strides,
                          const Strided<4>& maps, const Strided<4>& addend, const Categories& categories,
                          int64_t n_maps, bool average_heads, float scale, float weight, int threads,
                          const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    CrossAttentionMapsPlan plan{};
    set_inputs(plan, addresses, shape, strides);
    plan.out = reinterpret_cast<void*>(addresses[3]), plan.bf16 = is_bf16(dtype);
    std::tie(plan.batch, plan.queries, plan.tokens, plan.heads, plan.dim) = std::tuple_cat(shape);
    set_tensor(maps, plan.maps, plan.maps_stride), set_tensor(addend, plan.addend, plan.addend_stride);
    set_categories(plan, categories);
    plan.n_maps = maps ? n_maps : 0;
    plan.average_heads = average_heads, plan.scale = scale, plan.weight = weight;
    plan.contexts = plan.k_stride[0] || plan.v_stride[0] ? plan.batch : 1;
    if (plan.bf16) plan.packed_size = 2 * plan.dim * plan.tokens;
    plan.tile = choose_tile(plan, threads);
    plan.tiles = ceil_divide(plan.queries, plan.tile);

    const int64_t contexts = plan.contexts * plan.heads, tiles = plan.batch * plan.tiles;
    const int64_t per_query = 2 * plan.dim + 2 * plan.tokens + plan.n_maps + std::max(plan.dim, plan.n_maps);
    const int64_t per_thread = padded(plan.tile * per_query);
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

void cross_attention_maps_backward(const std::array<uintptr_t, 3>& inputs, const std::array<int64_t, 6>& shape,
                                   const std::array<std::array<int64_t, 2>, 3>& strides, const Strided<2>& grad_out,
                                   const Strided<4>& grad_maps, const std::array<uintptr_t, 3>& grads,
                                   const Categories& categories, int64_t n_maps, float scale, float weight, int threads,
                                   const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    CrossAttentionMapsBackwardPlan plan{};
    set_inputs(plan, inputs, shape, strides);
    plan.dq = reinterpret_cast<float*>(grads[0]), plan.dk = reinterpret_cast<float*>(grads[1]);
    plan.dv = reinterpret_cast<float*>(grads[2]);
    std::tie(plan.batch, plan.contexts, plan.queries, plan.tokens, plan.heads, plan.dim) = std::tuple_cat(shape);
    require(plan.contexts == 1 || plan.contexts == plan.batch, "contexts must be 1 or the batch");
    set_tensor(grad_out, plan.grad_out, plan.out_stride), set_tensor(grad_maps, plan.grad_maps, plan.maps_stride);
    set_categories(plan, categories);
    plan.n_maps = grad_maps ? n_maps : 0, plan.scale = scale, plan.weight = weight;
    plan.tiles = ceil_divide(plan.queries, BACKWARD_TILE_QUERIES);
    plan.padded_dim = padded(plan.dim);
    const int64_t contexts = plan.contexts * plan.heads, tiles = plan.batch / plan.contexts * plan.tiles;
    plan.chunks = std::min(tiles, ceil_divide(MIN_BACKWARD_ITEMS, contexts));

    const int64_t per_query = 2 * plan.tokens + plan.dim + 2 * plan.padded_dim + plan.n_maps;
    const int64_t items = contexts * plan.chunks, per_thread = padded(BACKWARD_TILE_QUERIES * per_query);
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

void bind_attention(py::module_& m) {
    m.def("self_attention", &self_attention, py::arg("addresses"), py::arg("dtype"), py::arg("shape"),
          py::arg("strides"), py::arg("scale"), py::arg("threads"), py::arg("isa") = "",
          "addresses: of q, k, v and out; dtype: theirs, float32 or bfloat16; shape: (batch, batch of k and v,\n"
          "queries, tokens, heads, dim); strides: (image, row) of q, k, v and out in elements.");
    m.def(
        "cross_attention_maps", &cross_attention_maps, py::arg("addresses"), py::arg("dtype"), py::arg("shape"),
        py::arg("strides"), py::arg("maps"), py::arg("addend"), py::arg("categories"), py::arg("n_maps"),
        py::arg("average_heads"), py::arg("scale"), py::arg("weight"), py::arg("threads"), py::arg("isa") = "",
        "addresses: of q, k, v and out; dtype: theirs, float32 or bfloat16; shape: (batch, queries, tokens, heads, dim);\n"
        "strides: (image, row) of q, k and v in elements; maps, addend: (address, strides) of float32 (batch, heads or\n"
        "1, queries, n_maps), or None; categories: addresses of int32 ids (tokens) and float32 weights (n_maps), or None.");
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
