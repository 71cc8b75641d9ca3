// 3x3 convolution, stride 1, zero padding 1, by Winograd's minimal filtering: products of transformed tiles of the input
// with transformed weights, one matrix product for each tap of the transform.
//
// A block of tiles goes through three steps while it stays in the cache: its input is activated and transformed into
// rows of elements, one for each tap and tile; these rows are multiplied with a panel of 32 columns of the weight, tap
// by tap; and the sums of a tile become its pixels.
#pragma once

#include <cstdint>

#include "cpu/gemm.h"
#include "isa.h"

namespace vpd {

constexpr int64_t MOST_TAPS = 36;
constexpr int64_t MOST_TILES_OF_BLOCK = 96;  // a multiple of the rows of the micro-kernel

struct WinogradConv2dPlan {
    int taps;       // 16: 2x2 pixels from 4x4; 36: 4x4 pixels from 6x6; 9: 2x2 pixels from 3x3 that are upsampled
    Source x, x2;   // (batch, height, width, channels); x2 adds channels, or its data are null
    int64_t batch, height, width;
    const float* affine;  // (batch, 2, channels): scale and shift, or null
    const float* factor;  // (channels), or null; the input is silu(x * scale + shift) * factor
    bool silu;
    Precision precision;
    const float* weight;         // (taps, panels, elements, PANEL), 32 bits each
    const float *scales, *sums;  // (taps, n), of 8 bits: weight = data * scale, sum of data over channels; otherwise null
    const float* bias;           // (n), or null
    int64_t n;
    Activation activation;
    Source residual;  // (batch, out_height, out_width, n), added last, or its data are null
    void* out;        // likewise
    bool out_bf16;
    int64_t out_height, out_width;
    int64_t out_image, out_row, out_column;  // strides in elements

    int64_t tile_rows, tile_columns;  // tiles of an image
    int64_t row_blocks, strips;       // of equal size as far as possible: row blocks of all images' tile rows, and
                                      // strips of the tile columns. A block is where they meet.

    int64_t channels, panels, elements;  // of x and x2; of the weight; of a row

    // In floats: the pixel of an activated row, with channels padded to whole vectors and one vector more; a row of
    // elements, which lie [tap][tile][element]; and a tap's rows. Behind all rows are the 8-bit scales, [tile][SCALES].
    // Products lie [tap][tile][column]. Strides are odd numbers of cache lines: what is read together must not fall into
    // the same sets of the cache.
    int64_t padded_channels, pixel, row, tap, scales_offset, product_tap;
};

constexpr int64_t SCALES_OF_TILE = 48;  // room for MOST_TAPS in whole vectors

// A block's tile rows, of all images; and its tile columns.
struct WinogradBlock {
    int64_t first_row, last_row, first_column, last_column;
};

static inline WinogradBlock winograd_block(const WinogradConv2dPlan& plan, int64_t block) {
    const int64_t rows = plan.batch * plan.tile_rows, y = block / plan.strips, x = block % plan.strips;
    return {rows * y / plan.row_blocks, rows * (y + 1) / plan.row_blocks, plan.tile_columns * x / plan.strips,
            plan.tile_columns * (x + 1) / plan.strips};
}

}  // namespace vpd

// The first transforms tile rows [first, last) of a block, counted within it, into `rows`; the second multiplies all rows
// of the block with panels [first, last), and stores the results. Memory is aligned to 64 bytes; scratch belongs to one
// thread.
VPD_DECLARE_PER_ISA(void winograd_conv2d_transform(const ::vpd::WinogradConv2dPlan& plan, int64_t block, int64_t first,
                                                   int64_t last, float* rows, float* scratch);
                    void winograd_conv2d_multiply(const ::vpd::WinogradConv2dPlan& plan, int64_t block, int64_t first,
                                                  int64_t last, const float* rows, float* scratch))
