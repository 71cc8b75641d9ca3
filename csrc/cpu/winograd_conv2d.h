// 3x3 convolution, stride 1, zero padding 1, by Winograd's minimal filtering: products of transformed tiles of the
// input with transformed weights, one GEMM for each matrix of the transformed weight.
//
// A block of tiles goes through three steps while it stays in the cache: its input is activated and transformed into
// rows of elements, one for each matrix and tile; these rows are multiplied with a panel of the weight, matrix by
// matrix; and the products of a tile become its pixels.
#pragma once

#include <cstdint>

#include "cpu/gemm.h"
#include "isa.h"

namespace vpd {

constexpr int64_t MAX_MATRICES = 36;
constexpr int64_t MAX_TILES = 96;  // of a block; a multiple of the rows of the micro-kernel

// The GEMM of one matrix: weight, scales and weight_sums are those of the first matrix, and those of the others follow;
// residual and out are (batch, out_height, out_width, n).
struct WinogradConv2dPlan : GemmPlan {
    int matrices;  // 16: 2x2 pixels from 4x4; 36: 4x4 pixels from 6x6; 9: 2x2 pixels from 3x3 that are upsampled
    int64_t height, width;
    int64_t out_height, out_width, out_column;  // out_column: stride

    int64_t tile_rows, tile_columns;  // tiles of an image
    int64_t row_blocks, strips;       // of equal size as far as possible: row blocks of all images' tile rows, and
                                      // strips of the tile columns. A block is where they meet.

    // Strides and offsets in floats. `pixel` is the stride of the pixels of an activated row, with channels padded to
    // whole vectors and one vector more; elements lie [matrix][tile][element]. Behind all rows are the 8-bit scales,
    // [matrix][MAX_TILES]. Products lie [matrix][tile][column], in a thread's scratch behind activated pixels. Strides are
    // odd numbers of cache lines: what is read together must not fall into the same sets of the cache.
    int64_t padded_channels, pixel, row, matrix_stride, scales_offset, products_offset, product_stride;
};

// A block's tile rows, of all images; and its tile columns.
struct WinogradBlock {
    int64_t first_row, last_row, first_column, last_column;
};

// Blocks are numbered down the strips.
static inline WinogradBlock winograd_block(const WinogradConv2dPlan& plan, int64_t block) {
    const int64_t rows = plan.images * plan.tile_rows, y = block % plan.row_blocks, x = block / plan.row_blocks;
    return {rows * y / plan.row_blocks, rows * (y + 1) / plan.row_blocks, plan.tile_columns * x / plan.strips,
            plan.tile_columns * (x + 1) / plan.strips};
}

}  // namespace vpd

// The first transforms tile rows [first, last) of a block, counted within it, into `rows`; the second multiplies all
// rows of the block with panels [first, last), and stores the results. Memory is aligned to 64 bytes. Scratch belongs
// to one thread; `continued`: since it was used for the tile row just above, only winograd_conv2d_multiply used it.
VPD_DECLARE_PER_ISA(void winograd_conv2d_transform(const ::vpd::WinogradConv2dPlan& plan, int64_t block, int64_t first,
                                                   int64_t last, bool continued, float* rows, float* scratch);
                    void winograd_conv2d_multiply(const ::vpd::WinogradConv2dPlan& plan, int64_t block, int64_t first,
                                                  int64_t last, const float* rows, float* scratch))
