// Bindings of self_attention, cross_attention_maps and its backward: check sizes, choose tiles, and share the work among
// threads.
#include "cpu/attention.h"

#include "bindings/cpu/support.h"

namespace vpd {
namespace {

template <size_t RANK>
using Strided = std::optional<std::tuple<uintptr_t, std::array<int64_t, RANK>>>;  // address, strides
// Addresses of q, k and v; dtype; batch, batch of k and v, queries, tokens, heads, dim; strides (image, row) of q, k and v
// in elements; scale.
using Attention = std::tuple<std::array<uintptr_t, 3>, std::string, std::array<int64_t, 6>,
                             std::array<std::array<int64_t, 2>, 3>, float>;
// Addresses of int32 ids (tokens) and float32 weights (n_maps) of categories, 0 for none; n_maps; weight.
using Maps = std::tuple<std::array<uintptr_t, 2>, int64_t, float>;

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

void set_attention(const Attention& arguments, AttentionPlan& plan) {
    const auto& [addresses, dtype, shape, strides, scale] = arguments;
    require(std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size > 0; }), "sizes must be positive");
    std::tie(plan.batch, plan.contexts, plan.queries, plan.tokens, plan.heads, plan.dim) = std::tuple_cat(shape);
    require(plan.contexts == 1 || plan.contexts == plan.batch, "contexts must be 1 or the batch");
    set_tensor(Strided<2>({addresses[0], strides[0]}), plan.q, plan.q_stride);
    set_tensor(Strided<2>({addresses[1], strides[1]}), plan.k, plan.k_stride);
    set_tensor(Strided<2>({addresses[2], strides[2]}), plan.v, plan.v_stride);
    plan.bf16 = is_bf16(dtype), plan.scale = scale;
}

void set_maps(const Maps& arguments, MapsPlan& plan) {
    const auto& [categories, n_maps, weight] = arguments;
    plan.category_ids = reinterpret_cast<const int32_t*>(categories[0]);
    plan.category_weights = reinterpret_cast<const float*>(categories[1]);
    plan.n_maps = n_maps, plan.weight = weight;
}

void self_attention(const Attention& attention, const Strided<2>& out, int threads, const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    SelfAttentionPlan plan{};
    set_attention(attention, plan);
    set_tensor(out, plan.out, plan.out_stride);

    const SelfAttentionSizes sizes = VPD_DISPATCH(isa, self_attention_sizes, plan);
    const int64_t contexts = plan.contexts * plan.heads;
    const int64_t parts = plan.batch * plan.heads * (ceil_divide(plan.queries, sizes.queries));
    run_unlocked([=] {
        const auto packed = allocate(contexts * sizes.packed);
        in_parts(contexts, threads, [&](int64_t first, int64_t last, int64_t) {
            VPD_DISPATCH(isa, self_attention_pack, plan, packed.get(), first, last);
        });
        in_parts(parts, threads, sizes.scratch, [&](int64_t first, int64_t last, float* scratch) {
            VPD_DISPATCH(isa, self_attention_parts, plan, packed.get(), first, last, scratch);
        });
    });
}

// Queries of a tile: enough to reuse each load of K and V, few enough for the cache and to give every thread work.
int64_t choose_tile(const CrossAttentionMapsPlan& plan, int threads) {
    const int64_t wanted = 2 * plan.tokens * plan.dim > MAX_HEAD_FLOATS ? MAX_TILE_QUERIES : MAX_TILE_QUERIES / 2;
    const int64_t fits = MAX_TILE_FLOATS / (2 * plan.tokens);
    const int64_t per_thread = plan.batch * plan.queries / (2 * std::max(threads, 1));
    return std::max(LANES, std::min({wanted, fits, per_thread}) / LANES * LANES);
}

void cross_attention_maps(const Attention& attention, uintptr_t out, const Strided<4>& maps, const Strided<4>& addend,
                          const Maps& options, bool average_heads, int threads, const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    CrossAttentionMapsPlan plan{};
    set_attention(attention, plan), set_maps(options, plan);
    plan.out = reinterpret_cast<void*>(out), plan.average_heads = average_heads;
    set_tensor(maps, plan.maps, plan.maps_stride), set_tensor(addend, plan.addend, plan.addend_stride);
    if (!plan.k_stride[0] && !plan.v_stride[0]) plan.contexts = 1;
    if (plan.bf16) plan.packed_size = 2 * plan.dim * plan.tokens;
    plan.tile = choose_tile(plan, threads);
    plan.tiles = ceil_divide(plan.queries, plan.tile);

    const int64_t contexts = plan.contexts * plan.heads;
    const int64_t per_query = 2 * plan.dim + 2 * plan.tokens + plan.n_maps + std::max(plan.dim, plan.n_maps);
    run_unlocked([=] {
        const auto packed = allocate(contexts * plan.packed_size);
        if (plan.packed_size)
            in_parts(contexts, threads, [&](int64_t first, int64_t last, int64_t) {
                VPD_DISPATCH(isa, cross_attention_maps_pack, plan, packed.get(), first, last);
            });
        in_parts(plan.batch * plan.tiles, threads, plan.tile * per_query,
                 [&](int64_t first, int64_t last, float* scratch) {
                     VPD_DISPATCH(isa, cross_attention_maps_tiles, plan, packed.get(), first, last, scratch);
                 });
    });
}

void cross_attention_maps_backward(const Attention& attention, const Strided<2>& grad_out, const Strided<4>& grad_maps,
                                   const std::array<uintptr_t, 3>& grads, const Maps& options, int threads,
                                   const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    CrossAttentionMapsBackwardPlan plan{};
    set_attention(attention, plan), set_maps(options, plan);
    require(!plan.bf16, "dtype must be float32");
    plan.dq = reinterpret_cast<float*>(grads[0]), plan.dk = reinterpret_cast<float*>(grads[1]);
    plan.dv = reinterpret_cast<float*>(grads[2]);
    set_tensor(grad_out, plan.grad_out, plan.out_stride), set_tensor(grad_maps, plan.grad_maps, plan.maps_stride);
    plan.tiles = ceil_divide(plan.queries, BACKWARD_TILE_QUERIES);
    plan.padded_dim = padded(plan.dim);
    const int64_t contexts = plan.contexts * plan.heads, tiles = plan.batch / plan.contexts * plan.tiles;
    plan.chunks = std::min(tiles, ceil_divide(MIN_BACKWARD_ITEMS, contexts));

    const int64_t per_query = 2 * plan.tokens + plan.dim + 2 * plan.padded_dim + plan.n_maps;
    const int64_t items = contexts * plan.chunks, scratch_floats = BACKWARD_TILE_QUERIES * per_query;
    const auto partial = allocate(items * 2 * plan.tokens * plan.padded_dim);

    py::gil_scoped_release unlocked;
    in_parts(items, threads, scratch_floats, [&](int64_t first, int64_t last, float* scratch) {
        VPD_DISPATCH(isa, cross_attention_maps_backward_chunks, plan, partial.get(), first, last, scratch);
    });
    in_parts(contexts, threads, [&](int64_t first, int64_t last, int64_t) {
        VPD_DISPATCH(isa, cross_attention_maps_backward_sum, plan, partial.get(), first, last);
    });
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def(
        "self_attention", &self_attention, py::arg("attention"), py::arg("out"), py::arg("threads"),
        py::arg("isa") = "",
        "attention: (addresses of q, k and v, which are float32 or bfloat16; dtype; (batch, batch of k and v, queries,\n"
        "tokens, heads, dim); strides (image, row) of q, k and v in elements; scale); out: address, strides likewise.");
    m.def(
        "cross_attention_maps", &cross_attention_maps, py::arg("attention"), py::arg("out"), py::arg("maps"),
        py::arg("addend"), py::arg("options"), py::arg("average_heads"), py::arg("threads"), py::arg("isa") = "",
        "attention: as in self_attention; out: address; maps, addend: (address, strides) of float32 (batch, heads or 1,\n"
        "queries, n_maps), or None; options: (addresses of int32 ids (tokens) and float32 weights (n_maps) of\n"
        "categories, 0 for none; n_maps, 0 without maps; weight).");
    m.def(
        "cross_attention_maps_backward", &cross_attention_maps_backward, py::arg("attention"), py::arg("grad_out"),
        py::arg("grad_maps"), py::arg("grads"), py::arg("options"), py::arg("threads"), py::arg("isa") = "",
        "attention: as in self_attention, float32; grad_out: (address, (image, row) strides), grad_maps: (address,\n"
        "strides) of (batch, heads or 1, queries, n_maps), one of them or both, or None; grads: addresses of float32\n"
        "gradients of q, k and v, contiguous; options: as in cross_attention_maps, with the weight of each head.");
}

}  // namespace vpd
