// What the bindings of linear and conv2d share: their common arguments, and the split of the work among threads.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/gemm.h"
#include "support.h"

namespace vpd {

using Tensor4 = std::tuple<uintptr_t, std::string, int64_t, std::array<int64_t, 3>>;  // address, dtype, channels, strides
using Packed = std::tuple<std::array<uintptr_t, 3>, std::string, int64_t, int64_t>;   // data, scales, sums; dtype, n, k

constexpr int64_t FLOATS_OF_BLOCK = 256 << 10;  // of rows of A: about what the second cache level holds
constexpr int64_t MOST_ROWS_TOGETHER = 384;     // for each thread: with more of them, each has rows of its own

inline bool is_bf16(const std::string& dtype) {
    require(dtype == "float32" || dtype == "bfloat16", "dtype must be float32 or bfloat16");
    return dtype == "bfloat16";
}

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
    plan.weight = floats_at(addresses[0]), plan.scales = floats_at(addresses[1]), plan.sums = floats_at(addresses[2]);
    require((dtype == "int8") == (plan.scales && plan.sums), "int8, and nothing else, has scales and sums");
    require(n > 0 && k > 0 && images > 0 && rows > 0, "sizes must be positive");
    const int64_t width = dtype == "int8" ? 4 : dtype == "bfloat16" ? 2 : 1;
    plan.elements = (k + width - 1) / width, plan.panels = (n + PANEL - 1) / PANEL;
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

// Calls make_rows(first, count, a, scratch), then gemm_panels. With many rows each thread has blocks of them; with few
// they are made first, together, and then each thread has panels of the weight, which are read only once.
template <typename MakeRows>
void run_gemm(const GemmPlan& plan, Isa isa, int64_t threads, MakeRows make_rows) {
    const int64_t rows = plan.images * plan.rows, row_floats = plan.row_floats, panels = plan.panels;
    const int64_t fits = FLOATS_OF_BLOCK / row_floats / 12 * 12;
    const int64_t block = std::max<int64_t>(12, std::min(fits, MOST_ROWS_OF_BLOCK));
    const int64_t blocks = (rows + block - 1) / block;
    threads = std::max<int64_t>(threads, 1);
    const int64_t scratch_floats = padded(plan.k + 2 * LANES);
    const bool together = rows <= MOST_ROWS_TOGETHER * threads;
    const auto a = allocate((together ? rows : std::min(threads, blocks) * block) * row_floats);
    const auto scratch = allocate(threads * scratch_floats);

    pybind11::gil_scoped_release unlocked;
    if (together) {
        in_parts(rows, threads, [&](int64_t first, int64_t last, int64_t part) {
            make_rows(first, last - first, a.get() + first * row_floats, scratch.get() + part * scratch_floats);
        });
        // With fewer panels than threads rows are shared as well. Items are (rows, panel).
        const int64_t groups = std::min(rows, (2 * threads + panels - 1) / panels);
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
        float* own = a.get() + part * block * row_floats;
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = rows * i / blocks, count = rows * (i + 1) / blocks - begin;
            make_rows(begin, count, own, scratch.get() + part * scratch_floats);
            VPD_DISPATCH(isa, gemm_panels, plan, own, begin, count, 0, panels);
        }
    });
}

}  // namespace vpd
