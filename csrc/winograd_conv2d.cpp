// Binding of winograd_conv2d: checks sizes, cuts the image into blocks of tiles, and shares them among threads.
#include "cpu/winograd_conv2d.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "support.h"

namespace vpd {
namespace {

namespace py = pybind11;

using Strided = std::tuple<uintptr_t, bool, int64_t, std::array<int64_t, 3>>;  // address, bfloat16, channels, strides

constexpr int64_t COLUMNS_OF_BLOCK = 16;

Source source_of(const std::optional<Strided>& tensor) {
    if (!tensor) return {};
    const auto& [address, bf16, channels, strides] = *tensor;
    require(channels > 0, "channels must be positive");
    return {reinterpret_cast<const void*>(address), bf16, channels, strides[0], strides[1], strides[2]};
}

template <typename T>
const T* pointer(const std::optional<uintptr_t>& address) {
    return reinterpret_cast<const T*>(address.value_or(0));
}

int64_t pieces(int64_t size, int64_t most) { return (size + most - 1) / most; }

int64_t odd_lines(int64_t floats) { return (pieces(floats, LANES) | 1) * LANES; }

// Memory that a plan needs, in floats: for the rows of a block, and for what one thread does with them.
struct Memory {
    int64_t rows, scratch;
};

// Cuts the tiles into blocks, and says where things lie in memory.
Memory lay_out(WinogradConv2dPlan& plan) {
    const int64_t out = plan.taps == 36 ? 4 : 2, step = plan.taps == 9 ? 1 : out, lines = plan.taps == 36 ? 12 : 8;
    plan.tile_rows = pieces(plan.out_height, out), plan.tile_columns = pieces(plan.out_width, out);
    plan.strips = pieces(plan.tile_columns, COLUMNS_OF_BLOCK);
    const int64_t columns = pieces(plan.tile_columns, plan.strips), all_rows = plan.batch * plan.tile_rows;
    plan.row_blocks = pieces(all_rows, std::max<int64_t>(1, MOST_TILES_OF_BLOCK / columns));
    const int64_t tiles = pieces(all_rows, plan.row_blocks) * columns;

    const int64_t width = plan.precision == Precision::int8 ? 4 : plan.precision == Precision::bfloat16 ? 2 : 1;
    plan.channels = plan.x.channels + plan.x2.channels;
    plan.panels = pieces(plan.n, PANEL), plan.elements = pieces(plan.channels, width);
    plan.padded_channels = padded(plan.channels), plan.pixel = odd_lines(plan.padded_channels + LANES);
    plan.row = odd_lines(plan.padded_channels / width), plan.tap = odd_lines(tiles * plan.row);
    plan.scales_offset = plan.taps * plan.tap, plan.product_tap = odd_lines(tiles * PANEL);
    const int64_t activated = lines * (columns * step + 2) * plan.pixel;  // and as many after the vertical transform
    return {plan.scales_offset + tiles * SCALES_OF_TILE, std::max(activated, plan.taps * plan.product_tap)};
}

Precision precision_of(const std::string& name) {
    require(name == "float32" || name == "bfloat16" || name == "int8", "precision must be float32, bfloat16 or int8");
    return name == "float32" ? Precision::float32 : name == "bfloat16" ? Precision::bfloat16 : Precision::int8;
}

Activation activation_of(const std::string& name) {
    require(name.empty() || name == "relu" || name == "silu", "activation must be '', relu or silu");
    return name.empty() ? Activation::none : name == "relu" ? Activation::relu : Activation::silu;
}

void run(WinogradConv2dPlan& plan, int64_t threads, Isa isa) {
    const Memory memory = lay_out(plan);
    const int64_t blocks = plan.row_blocks * plan.strips, rows_size = padded(memory.rows);
    const int64_t scratch_size = padded(memory.scratch);
    // Few blocks are worked on by all threads together, many by one thread each.
    const bool together = blocks < 4 * threads;
    const auto rows = allocate(rows_size * (together ? 1 : threads));
    const auto scratch = allocate(scratch_size * threads);

    const auto transform = [&](int64_t block, int64_t first, int64_t last, int64_t part, float* to) {
        VPD_DISPATCH(isa, winograd_conv2d_transform, plan, block, first, last, to, scratch.get() + part * scratch_size);
    };
    const auto multiply = [&](int64_t block, int64_t first, int64_t last, int64_t part, const float* from) {
        VPD_DISPATCH(isa, winograd_conv2d_multiply, plan, block, first, last, from, scratch.get() + part * scratch_size);
    };
    const auto rows_of = [&](int64_t block) {
        return winograd_block(plan, block).last_row - winograd_block(plan, block).first_row;
    };

    if (!together) {
        in_parts(blocks, threads, [&](int64_t first, int64_t last, int64_t part) {
            float* own = rows.get() + part * rows_size;
            for (int64_t block = first; block < last; ++block) {
                transform(block, 0, rows_of(block), part, own);
                multiply(block, 0, plan.panels, part, own);
            }
        });
        return;
    }
    for (int64_t block = 0; block < blocks; ++block) {
        in_parts(rows_of(block), threads, [&](int64_t first, int64_t last, int64_t part) {
            transform(block, first, last, part, rows.get());
        });
        in_parts(plan.panels, threads, [&](int64_t first, int64_t last, int64_t part) {
            multiply(block, first, last, part, rows.get());
        });
    }
}

void winograd_conv2d(int taps, const std::array<int64_t, 3>& shape, const Strided& x, const std::optional<Strided>& x2,
                     const std::string& precision, uintptr_t weight, std::optional<uintptr_t> scales,
                     std::optional<uintptr_t> sums, std::optional<uintptr_t> bias, std::optional<uintptr_t> affine,
                     std::optional<uintptr_t> factor, bool silu, const std::string& activation,
                     const std::optional<Strided>& residual, const Strided& out, int threads,
                     const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    require(taps == 9 || taps == 16 || taps == 36, "taps must be 9, 16 or 36");
    require(std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size > 0; }), "sizes must be positive");
    WinogradConv2dPlan plan{};
    plan.taps = taps;
    std::tie(plan.batch, plan.height, plan.width) = std::tuple_cat(shape);
    plan.x = source_of(x), plan.x2 = source_of(x2), plan.residual = source_of(residual);
    plan.precision = precision_of(precision), plan.activation = activation_of(activation);
    plan.weight = reinterpret_cast<const float*>(weight);
    plan.scales = pointer<float>(scales), plan.sums = pointer<float>(sums), plan.bias = pointer<float>(bias);
    require(plan.precision != Precision::int8 || (plan.scales && plan.sums), "int8 needs scales and sums");
    plan.affine = pointer<float>(affine), plan.factor = pointer<float>(factor), plan.silu = silu;
    const Source target = source_of(out);
    plan.out = const_cast<void*>(target.data), plan.out_bf16 = target.bf16, plan.n = target.channels;
    plan.out_image = target.image, plan.out_row = target.row, plan.out_column = target.column;
    require(!plan.residual.data || plan.residual.channels == plan.n, "residual and out must have the same channels");
    const int64_t zoom = taps == 9 ? 2 : 1;
    plan.out_height = plan.height * zoom, plan.out_width = plan.width * zoom;

    py::gil_scoped_release unlocked;
    run(plan, std::max(threads, 1), isa);
}

}  // namespace

void bind_winograd_conv2d(py::module_& m) {
    m.def("winograd_conv2d", &winograd_conv2d, py::arg("taps"), py::arg("shape"), py::arg("x"), py::arg("x2"),
          py::arg("precision"), py::arg("weight"), py::arg("scales"), py::arg("sums"), py::arg("bias"),
          py::arg("affine"), py::arg("factor"), py::arg("silu"), py::arg("activation"), py::arg("residual"),
          py::arg("out"), py::arg("threads"), py::arg("isa") = "",
          "shape: (batch, height, width) of x; x, x2, residual, out: (address, whether bfloat16 or else float32, channels,\n"
          "(image, row, column) strides in elements), x2 and residual also None; precision: of the weight, float32,\n"
          "bfloat16 or int8; weight: address of (taps, panels, elements, 32) elements of 32 bits; the other addresses,\n"
          "or None, are of float32: scales, sums (taps, n), bias (n), affine (batch, 2, channels), factor (channels).");
}

}  // namespace vpd
