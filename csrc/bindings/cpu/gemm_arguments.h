// Arguments that the bindings of linear, conv2d and winograd_conv2d share.
#pragma once

#include "bindings/cpu/support.h"
#include "cpu/gemm.h"

namespace vpd {

// Address, dtype, channels, strides (image, row, column) in elements; the rows of `linear` have no columns, nor have the
// positions of `conv2d`'s residual and out.
using Tensor4 = std::tuple<uintptr_t, std::string, int64_t, std::array<int64_t, 3>>;
// Addresses of data, scales and weight sums, as packed; dtype, n, k.
using Packed = std::tuple<std::array<uintptr_t, 3>, std::string, int64_t, int64_t>;
// x, x2 or None; weight; addresses of float32 bias (n), affine (images, 2, channels) and smoothing (channels), 0 for none;
// silu; activation; residual or None, out.
using Gemm = std::tuple<Tensor4, std::optional<Tensor4>, Packed, std::array<uintptr_t, 3>, bool, std::string,
                        std::optional<Tensor4>, Tensor4>;

inline Source make_source(const std::optional<Tensor4>& tensor) {
    if (!tensor) return {};
    const auto& [address, dtype, channels, strides] = *tensor;
    require(channels > 0, "there must be channels");
    return {reinterpret_cast<const void*>(address), is_bf16(dtype), channels, strides[0], strides[1], strides[2]};
}

inline const float* floats_at(uintptr_t address) { return reinterpret_cast<const float*>(address); }

// positions: that a row of A reads.
inline GemmPlan make_gemm(const Gemm& arguments, int64_t images, int64_t rows, int64_t positions = 1) {
    const auto& [x, x2, weight, vectors, silu, activation, residual, out] = arguments;
    const auto& [addresses, dtype, n, k] = weight;
    GemmPlan plan{};
    plan.x[0] = make_source(x), plan.x[1] = make_source(x2), plan.silu = silu;
    require((plan.x[0].channels + plan.x[1].channels) * positions == k, "channels do not fit the weight");
    plan.bias = floats_at(vectors[0]), plan.affine = floats_at(vectors[1]), plan.smoothing = floats_at(vectors[2]);
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
    plan.n = n, plan.k = k, plan.images = images, plan.rows = rows;
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

}  // namespace vpd
