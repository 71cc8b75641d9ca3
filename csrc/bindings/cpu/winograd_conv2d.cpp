// Binding of winograd_conv2d: checks sizes, cuts the image into blocks of tiles, and shares them among threads.
#include "cpu/winograd_conv2d.h"

#include "bindings/cpu/gemm_arguments.h"

namespace vpd {
namespace {

constexpr int64_t MIN_BLOCKS_PER_THREAD = 4;          // with fewer, all threads work on one block together
constexpr int64_t MAX_BLOCK_COLUMNS = 16;             // of tiles
constexpr int64_t MAX_CACHED_WEIGHT_BYTES = 6 << 20;  // a larger weight is read from memory, which takes time

int64_t odd_cache_lines(int64_t floats) { return (ceil_divide(floats, LANES) | 1) * LANES; }

// Tiles of a block. With few, rows and products stay in the second cache level; but the weight is read once per block,
// so that one which comes from memory needs many.
int64_t max_tiles(const WinogradConv2dPlan& plan) {
    const int64_t bytes = plan.matrices * plan.panels * PANEL * plan.elements * 4;
    return bytes > MAX_CACHED_WEIGHT_BYTES ? MAX_TILES : MAX_TILES / 2;
}

// Floats of memory that a plan needs: for the rows of a block, and as scratch memory of one thread.
struct Memory {
    int64_t rows, scratch;
};

// Cuts the tiles into blocks, sets the layout of memory, and returns its size.
Memory plan_memory(WinogradConv2dPlan& plan) {
    // In one dimension: output pixels of a tile, input pixels between tiles, input pixels and points of a tile.
    const int64_t out = plan.matrices == 36 ? 4 : 2, step = plan.matrices == 9 ? 1 : out;
    const int64_t side = step + 2, points = plan.matrices == 36 ? 6 : plan.matrices == 9 ? 3 : 4;
    plan.tile_rows = ceil_divide(plan.out_height, out), plan.tile_columns = ceil_divide(plan.out_width, out);
    plan.strips = ceil_divide(plan.tile_columns, MAX_BLOCK_COLUMNS);
    const int64_t columns = ceil_divide(plan.tile_columns, plan.strips), all_rows = plan.images * plan.tile_rows;
    plan.row_blocks = ceil_divide(all_rows, max_tiles(plan) / columns);
    const int64_t tiles = ceil_divide(all_rows, plan.row_blocks) * columns;

    plan.padded_channels = padded(plan.k), plan.pixel = odd_cache_lines(plan.padded_channels + LANES);
    const Precision precision = plan.precision;
    const int64_t width = precision == Precision::int8 ? 4 : precision == Precision::bfloat16 ? 2 : 1;
    plan.row = odd_cache_lines(plan.padded_channels / width);
    plan.matrix_stride = odd_cache_lines(tiles * plan.row), plan.product_stride = odd_cache_lines(tiles * PANEL);
    plan.scales_offset = plan.matrices * plan.matrix_stride;
    plan.products_offset = side * (columns * step + 2 + points) * plan.pixel;
    return {plan.scales_offset + plan.matrices * MAX_TILES, plan.products_offset + plan.matrices * plan.product_stride};
}

void run_blocks(const WinogradConv2dPlan& plan, const Memory& sizes, int64_t threads, Isa isa) {
    const int64_t blocks = plan.row_blocks * plan.strips, rows_size = padded(sizes.rows);
    const int64_t scratch_size = padded(sizes.scratch);
    // All threads work together on each of a few blocks; many blocks are divided among them.
    const bool shared_blocks = blocks < MIN_BLOCKS_PER_THREAD * threads;
    const auto rows = allocate(rows_size * (shared_blocks ? 1 : threads));
    const auto scratch = allocate(scratch_size * threads);
    const auto height = [&](int64_t block) {
        return winograd_block(plan, block).last_row - winograd_block(plan, block).first_row;
    };

    if (!shared_blocks) {
        in_parts(blocks, threads, [&](int64_t first, int64_t last, int64_t part) {
            float *thread_rows = rows.get() + part * rows_size, *memory = scratch.get() + part * scratch_size;
            for (int64_t block = first; block < last; ++block) {
                const bool continued = block > first && block % plan.row_blocks != 0;
                VPD_DISPATCH(isa, winograd_conv2d_transform, plan, block, 0, height(block), continued, thread_rows,
                             memory);
                VPD_DISPATCH(isa, winograd_conv2d_multiply, plan, block, 0, plan.panels, thread_rows, memory);
            }
        });
        return;
    }
    for (int64_t block = 0; block < blocks; ++block) {
        in_parts(height(block), threads, [&](int64_t first, int64_t last, int64_t part) {
            float* memory = scratch.get() + part * scratch_size;
            VPD_DISPATCH(isa, winograd_conv2d_transform, plan, block, first, last, false, rows.get(), memory);
        });
        in_parts(plan.panels, threads, [&](int64_t first, int64_t last, int64_t part) {
            float* memory = scratch.get() + part * scratch_size;
            VPD_DISPATCH(isa, winograd_conv2d_multiply, plan, block, first, last, rows.get(), memory);
        });
    }
}

void winograd_conv2d(const Gemm& gemm, const std::array<int64_t, 3>& shape, int matrices, int threads,
                     const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    const auto& [images, height, width] = shape;
    require(matrices == 9 || matrices == 16 || matrices == 36, "taps must be 9, 16 or 36");
    require(height > 0 && width > 0, "sizes must be positive");
    const int64_t zoom = matrices == 9 ? 2 : 1;
    WinogradConv2dPlan plan{};
    static_cast<GemmPlan&>(plan) = make_gemm(gemm, images, height * width * zoom * zoom);
    require(plan.activation != Activation::geglu, "activation must be '', relu or silu");
    plan.matrices = matrices, plan.height = height, plan.width = width;
    plan.out_height = height * zoom, plan.out_width = width * zoom;
    plan.out_column = std::get<3>(std::get<7>(gemm))[2];
    const Memory sizes = plan_memory(plan);
    run_unlocked([=] { run_blocks(plan, sizes, std::max(threads, 1), isa); });
}

}  // namespace

void bind_winograd_conv2d(py::module_& m) {
    m.def("winograd_conv2d", &winograd_conv2d, py::arg("gemm"), py::arg("shape"), py::arg("matrices"),
          py::arg("threads"), py::arg("isa") = "", "gemm: as in linear; shape: (images, height, width) of x.");
}

}  // namespace vpd
