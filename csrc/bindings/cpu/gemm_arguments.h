// Arguments that the bindings of linear, conv2d and winograd_conv2d share, and the division of a GEMM among threads.
#pragma once

#include "bindings/cpu/support.h"
#include "cpu/gemm.h"

namespace vpd {

// Address, dtype, channels, strides.
using Tensor4 = std::tuple<uintptr_t, std::string, int64_t, std::array<int64_t, 3>>;
// Addresses of data, scales and weight sums; dtype, n, k.
using Packed = std::tuple<std::array<uintptr_t, 3>, std::string, int64_t, int64_t>;

constexpr int64_t MAX_BLOCK_FLOATS = 256 << 10;  // of rows of A: about what the second cache level holds
constexpr int64_t MAX_SHARED_ROWS = 384;         // per thread; with more, every thread has its own block of rows

inline Source make_source(const std::optional<Tensor4>& tensor) {
    if (!tensor) return {};
    const auto& [address, dtype, channels, strides] = *tensor;
    require(channels > 0, "there must be channels");
    return {reinterpret_cast<const void*>(address), is_bf16(dtype), channels, strides[0], strides[1], strides[2]};
}

inline const float* floats_at(uintptr_t address) { return reinterpret_cast<const float*>(address); }

inline GemmPlan make_gemm(const Packed& weight, uintptr_t bias, int64_t images, int64_t rows,
                          const std::string& activation, const std::optional<Tensor4>& residual, const Tensor4& out) {
    const auto& [addresses, dtype, n, k] = weight;
    GemmPlan plan{};
    require(dtype == "float32" || dtype == "bfloat16" || dtype == "int8", "weight must be float32, bfloat16 or int8");
    plan.precision = dtype == "int8" ? Precision::int8 : is_bf16(dtype) ? Precision::bfloat16 : Precision::float32;
    plan.weight = floats_at(addresses[0]), plan.scales = floats_at(addresses[1]),
    plan.weight_sums = floats_at(addresses[2]);
    require((dtype == "int8") == (plan.scales && plan.weight_sums), "int8, and nothing else, has scales and sums");
    require(n > 0 && k > 0 && images > 0 && rows > 0, "sizes must be positive");
    const int64_t width = dtype == "int8" ? 4 : dtype == "bfloat16" ? 2 : 1;
    plan.elements = ceil_divide(k, width), plan.panels = ceil_divide(n, PANEL);
    // 16 floats may be written beyond the elements. An odd number of cache lines: rows that are multiplied together must
    // not fall into the same sets of the first cache level.
    plan.row_floats = (padded(plan.elements + LANES) / LANES | 1) * LANES;
    plan.bias = floats_at(bias), plan.n = n, plan.k = k, plan.images = images, plan.rows = rows;
    require(activation == "" || activation == "relu" || activation == "silu" || activation == "geglu",
            "activation must be '', relu, silu or geglu");
    plan.activation = activation == "relu"   ? Activation::relu
                      : activation == "silu" ? Activation::silu
                      : activation == ""     ? Activation::none
                                             : Activation::geglu;
    const int64_t n_out = activation == "geglu" ? n / 2 : n;
    require(activation != "geglu" || n % 2 == 0, "geglu needs an even number of columns");
    const Source target = make_source(out);
    plan.residual = make_source(residual);
    require(target.channels == n_out && (!residual || plan.residual.channels == n_out), "out or residual do not fit");
    plan.out = const_cast<void*>(target.data), plan.out_bf16 = target.bf16;
    plan.out_image = target.image, plan.out_row = target.row;
    return plan;
}

// Calls make_rows(first, count, a, scratch), then gemm_panels. With many rows each thread computes blocks of rows. With
// few, all threads first make the rows together and then divide the panels of the weight, each of which is read once.
template <typename MakeRows>
void run_gemm(const GemmPlan& plan, Isa isa, int64_t threads, MakeRows make_rows) {
    const int64_t rows = plan.images * plan.rows, row_floats = plan.row_floats, panels = plan.panels;
    const int64_t fits = MAX_BLOCK_FLOATS / row_floats / 12 * 12;
    const int64_t block = std::max<int64_t>(12, std::min(fits, MAX_BLOCK_ROWS));
    const int64_t blocks = ceil_divide(rows, block);
    threads = std::max<int64_t>(threads, 1);
    const int64_t scratch_floats = padded(plan.k + 2 * LANES);
    const bool shared_rows = rows <= MAX_SHARED_ROWS * threads;
    const auto a = allocate((shared_rows ? rows : std::min(threads, blocks) * block) * row_floats);
    const auto scratch = allocate(threads * scratch_floats);

    py::gil_scoped_release unlocked;
    if (shared_rows) {
        in_parts(rows, threads, [&](int64_t first, int64_t last, int64_t part) {
            make_rows(first, last - first, a.get() + first * row_floats, scratch.get() + part * scratch_floats);
        });
        // With fewer panels than threads rows are shared as well. Items are (rows, panel).
        const int64_t groups = std::min(rows, ceil_divide(2 * threads, panels));
        in_parts(groups * panels, threads, [&](int64_t first, int64_t last, int64_t) {
            for (int64_t group = first / panels; group * panels < last; ++group) {
                const int64_t begin = rows * group / groups, count = rows * (group + 1) / groups - begin;
                VPD_DISPATCH(isa, gemm_panels, plan, a.get() + begin * row_floats, begin, count,
                             std::max(first - group * panels, int64_t{0}), std::min(last - group * panels, panels));
            }
        });
        return;
    }
    in_parts(blocks, threads, [&](int64_t first, int64_t last, int64_t part) {
        float* block_rows = a.get() + part * block * row_floats;
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = rows * i / blocks, count = rows * (i + 1) / blocks - begin;
            make_rows(begin, count, block_rows, scratch.get() + part * scratch_floats);
            VPD_DISPATCH(isa, gemm_panels, plan, block_rows, begin, count, 0, panels);
        }
    });
}

}  // namespace vpd
