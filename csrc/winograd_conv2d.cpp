// Binding of winograd_conv2d: checks sizes, cuts the image into blocks of tiles, and shares them among threads.
#include "cpu/winograd_conv2d.h"

#include "bindings.h"
#include "gemm.h"

namespace vpd {
namespace {

namespace py = pybind11;

constexpr int64_t BLOCKS_PER_THREAD = 4;  // at least, for blocks to be what threads share
constexpr int64_t COLUMNS_OF_BLOCK = 16;  // at most, of tiles
constexpr int64_t BYTES_OF_WEIGHT = 6 << 20;  // beyond, its reading counts

int64_t pieces(int64_t size, int64_t most) { return (size + most - 1) / most; }

int64_t odd_lines(int64_t floats) { return (pieces(floats, LANES) | 1) * LANES; }

// Tiles of a block: fewer let rows and products stay in the second cache level; the weight is read once for each block,
// and more if it comes from memory.
int64_t most_tiles(const WinogradConv2dPlan& plan) {
    const int64_t bytes = plan.taps * plan.gemm.panels * PANEL * plan.gemm.elements * 4;
    return bytes > BYTES_OF_WEIGHT ? MOST_TILES : MOST_TILES / 2;
}

// Floats of memory that a plan needs: for the rows of a block, and for what one thread does with them.
struct Memory {
    int64_t rows, scratch;
};

// Cuts the tiles into blocks, and says where things lie in memory.
Memory lay_out(WinogradConv2dPlan& plan) {
    const int64_t out = plan.taps == 36 ? 4 : 2, step = plan.taps == 9 ? 1 : out;  // pixels of a tile, between tiles
    const int64_t side = step + 2, taps = plan.taps == 36 ? 6 : plan.taps == 9 ? 3 : 4;  // of a tile, in one dimension
    plan.tile_rows = pieces(plan.out_height, out), plan.tile_columns = pieces(plan.out_width, out);
    plan.strips = pieces(plan.tile_columns, COLUMNS_OF_BLOCK);
    const int64_t columns = pieces(plan.tile_columns, plan.strips), all_rows = plan.gemm.images * plan.tile_rows;
    plan.row_blocks = pieces(all_rows, most_tiles(plan) / columns);
    const int64_t tiles = pieces(all_rows, plan.row_blocks) * columns;

    plan.padded_channels = padded(plan.gemm.k), plan.pixel = odd_lines(plan.padded_channels + LANES);
    const Precision precision = plan.gemm.precision;
    const int64_t width = precision == Precision::int8 ? 4 : precision == Precision::bfloat16 ? 2 : 1;
    plan.row = odd_lines(plan.padded_channels / width);
    plan.tap = odd_lines(tiles * plan.row), plan.product_tap = odd_lines(tiles * PANEL);
    plan.scales_offset = plan.taps * plan.tap;
    plan.products_offset = side * (columns * step + 2 + taps) * plan.pixel;
    return {plan.scales_offset + plan.taps * MOST_TILES, plan.products_offset + plan.taps * plan.product_tap};
}

void run(WinogradConv2dPlan& plan, int64_t threads, Isa isa) {
    const Memory memory = lay_out(plan);
    const int64_t blocks = plan.row_blocks * plan.strips, rows_size = padded(memory.rows);
    const int64_t scratch_size = padded(memory.scratch);
    // Few blocks are worked on by all threads together, many by one thread each.
    const bool together = blocks < BLOCKS_PER_THREAD * threads;
    const auto rows = allocate(rows_size * (together ? 1 : threads));
    const auto scratch = allocate(scratch_size * threads);
    const auto height = [&](int64_t block) {
        return winograd_block(plan, block).last_row - winograd_block(plan, block).first_row;
    };

    py::gil_scoped_release unlocked;
    if (!together) {
        in_parts(blocks, threads, [&](int64_t first, int64_t last, int64_t part) {
            float *own_rows = rows.get() + part * rows_size, *own = scratch.get() + part * scratch_size;
            for (int64_t block = first; block < last; ++block) {
                const bool continued = block > first && block % plan.row_blocks != 0;
                VPD_DISPATCH(isa, winograd_conv2d_transform, plan, block, 0, height(block), continued, own_rows, own);
                VPD_DISPATCH(isa, winograd_conv2d_multiply, plan, block, 0, plan.gemm.panels, own_rows, own);
            }
        });
        return;
    }
    for (int64_t block = 0; block < blocks; ++block) {
        in_parts(height(block), threads, [&](int64_t first, int64_t last, int64_t part) {
            float* own = scratch.get() + part * scratch_size;
            VPD_DISPATCH(isa, winograd_conv2d_transform, plan, block, first, last, false, rows.get(), own);
        });
        in_parts(plan.gemm.panels, threads, [&](int64_t first, int64_t last, int64_t part) {
            float* own = scratch.get() + part * scratch_size;
            VPD_DISPATCH(isa, winograd_conv2d_multiply, plan, block, first, last, rows.get(), own);
        });
    }
}

void winograd_conv2d(const Tensor4& x, const std::optional<Tensor4>& x2, const std::array<int64_t, 3>& shape, int taps,
                     const Packed& weight, const std::array<uintptr_t, 3>& vectors, bool silu,
                     const std::string& activation, const std::optional<Tensor4>& residual, const Tensor4& out,
                     int threads, const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    require(taps == 9 || taps == 16 || taps == 36, "taps must be 9, 16 or 36");
    require(activation != "geglu", "activation must be '', relu or silu");
    const auto& [images, height, width] = shape;
    require(height > 0 && width > 0, "sizes must be positive");
    const int64_t zoom = taps == 9 ? 2 : 1;
    WinogradConv2dPlan plan{};
    plan.gemm = make_gemm(weight, vectors[0], images, height * width * zoom * zoom, activation, residual, out);
    plan.taps = taps, plan.x[0] = make_source(x), plan.x[1] = make_source(x2);
    require(plan.x[0].channels + plan.x[1].channels == plan.gemm.k, "channels do not fit the weight");
    plan.height = height, plan.width = width;
    plan.affine = floats_at(vectors[1]), plan.factor = floats_at(vectors[2]), plan.silu = silu;
    plan.out_height = height * zoom, plan.out_width = width * zoom, plan.out_column = std::get<3>(out)[2];
    run(plan, std::max(threads, 1), isa);
}

}  // namespace

void bind_winograd_conv2d(py::module_& m) {
    m.def("winograd_conv2d", &winograd_conv2d, py::arg("x"), py::arg("x2"), py::arg("shape"), py::arg("taps"),
          py::arg("weight"), py::arg("vectors"), py::arg("silu"), py::arg("activation"), py::arg("residual"),
          py::arg("out"), py::arg("threads"), py::arg("isa") = "",
          "x, x2, residual, out: (address, dtype, channels, strides (image, row, column)) in elements; x2 and\n"
          "residual may be None; shape: (images, height, width) of x; weight: ((data, scales, sums), dtype, n, k)\n"
          "as packed; vectors: addresses of float32 bias (n), affine (images, 2, channels) and factor (channels), 0\n"
          "for none.");
}

}  // namespace vpd
