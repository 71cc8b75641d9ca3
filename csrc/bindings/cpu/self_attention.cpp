// Binding of self_attention: checks sizes, and shares the work among threads.
#include "cpu/self_attention.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "bindings/cpu/operators.h"
#include "bindings/cpu/support.h"

namespace vpd {
namespace {

namespace py = pybind11;

void self_attention(const std::array<uintptr_t, 4>& addresses, const std::string& dtype,
                    const std::array<int64_t, 6>& shape, const std::array<std::array<int64_t, 2>, 4>& strides,
                    float scale, int threads, const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    require(std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size > 0; }), "sizes must be positive");
    SelfAttentionPlan plan{};
    plan.q = reinterpret_cast<const void*>(addresses[0]), plan.k = reinterpret_cast<const void*>(addresses[1]);
    plan.v = reinterpret_cast<const void*>(addresses[2]), plan.out = reinterpret_cast<void*>(addresses[3]);
    plan.bf16 = is_bf16(dtype);
    std::tie(plan.batch, plan.contexts, plan.queries, plan.tokens, plan.heads, plan.dim) = std::tuple_cat(shape);
    require(plan.contexts == 1 || plan.contexts == plan.batch, "contexts must be 1 or batch");
    std::copy(strides[0].begin(), strides[0].end(), plan.q_stride);
    std::copy(strides[1].begin(), strides[1].end(), plan.k_stride);
    std::copy(strides[2].begin(), strides[2].end(), plan.v_stride);
    std::copy(strides[3].begin(), strides[3].end(), plan.out_stride);
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

}  // namespace

void bind_self_attention(py::module_& m) {
    m.def("self_attention", &self_attention, py::arg("addresses"), py::arg("dtype"), py::arg("shape"),
          py::arg("strides"), py::arg("scale"), py::arg("threads"), py::arg("isa") = "",
          "addresses: of q, k, v and out; dtype: theirs, float32 or bfloat16; shape: (batch, batch of k and v,\n"
          "queries, tokens, heads, dim); strides: (image, row) of q, k, v and out in elements.");
}

}  // namespace vpd
