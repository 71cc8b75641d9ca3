// Binding of group_norm_affine: checks sizes and shares chunks of rows among threads.
#include "cpu/group_norm_affine.h"

#include "bindings/cpu/support.h"

namespace vpd {
namespace {

// Address, dtype, channels, strides.
using Source = std::tuple<uintptr_t, std::string, int64_t, std::array<int64_t, 2>>;

constexpr int64_t MIN_CHUNK_ROWS = 128;  // keeps the statistics small beside the rows that they summarise
constexpr int64_t MAX_CHUNKS = 64;       // per image: enough for as many threads

void group_norm_affine(const std::vector<Source>& sources, const std::array<int64_t, 2>& shape, int64_t groups,
                       double eps, const std::array<uintptr_t, 3>& addresses, int threads,
                       const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    GroupNormAffinePlan plan{};
    std::tie(plan.batch, plan.rows) = std::tuple_cat(shape);
    plan.n_sources = static_cast<int64_t>(sources.size());
    require(plan.n_sources == 1 || plan.n_sources == 2, "there must be one source or two");
    require(plan.batch >= 0 && plan.rows > 0 && groups > 0, "all sizes but the batch must be positive");
    int64_t channels = 0;
    for (int64_t s = 0; s < plan.n_sources; ++s) {
        const auto& [address, dtype, count, strides] = sources[s];
        require(count > 0, "every source must have channels");
        plan.sources[s] = {
            reinterpret_cast<const void*>(address), is_bf16(dtype), count, strides[0], strides[1], plan.width};
        plan.width += padded(count), channels += count;
    }
    require(channels % groups == 0, "groups must divide the channels");
    plan.groups = groups, plan.eps = eps;
    plan.weight = reinterpret_cast<const float*>(addresses[0]),
    plan.bias = reinterpret_cast<const float*>(addresses[1]);
    plan.out = reinterpret_cast<float*>(addresses[2]);
    plan.chunk = std::max(MIN_CHUNK_ROWS, ceil_divide(plan.rows, MAX_CHUNKS));
    plan.chunks = ceil_divide(plan.rows, plan.chunk);

    const int64_t items = plan.batch * plan.chunks;
    run_unlocked([=] {
        const auto statistics = allocate(2 * items * 2 * plan.width);  // doubles
        double* doubles = reinterpret_cast<double*>(statistics.get());
        in_parts(items, threads, 3 * plan.width, [&](int64_t first, int64_t last, float* scratch) {
            VPD_DISPATCH(isa, group_norm_affine_statistics, plan, doubles, first, last, scratch);
        });
        in_parts(plan.batch, threads, [&](int64_t first, int64_t last, int64_t) {
            VPD_DISPATCH(isa, group_norm_affine_scale_shift, plan, doubles, first, last);
        });
    });
}

}  // namespace

void bind_group_norm_affine(py::module_& m) {
    m.def(
        "group_norm_affine", &group_norm_affine, py::arg("sources"), py::arg("shape"), py::arg("groups"),
        py::arg("eps"), py::arg("addresses"), py::arg("threads"), py::arg("isa") = "",
        "sources: one or two (address, dtype, channels, (image stride, row stride)), float32 or bfloat16, strides in\n"
        "elements; shape: (batch, rows); addresses: of float32 weight and bias (all channels) and contiguous float32\n"
        "out (batch, 2, all channels).");
}

}  // namespace vpd
