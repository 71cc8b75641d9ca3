// Tiles and steps of the GEMM, on which its kernels, its epilogue and its host code agree.
//
// The rows of a tile are a box of output positions, a power of two along columns, rows and images, in this order. One box
// of the image is then what each tap reads of it, which is how TMA fetches tiles, and a row's position costs two shifts.
// A step is 128 bytes of K: a block of the channels of one source under one tap; the last block of a tap may be shorter.
#pragma once

#include "cuda/gemm.h"
#include "cuda/primitives.cuh"

namespace vpd::gemm {

using namespace device;

constexpr int WARP = 32, STEP_BYTES = 128, PART_BYTES = 32;  // a part of a step is what one matrix instruction takes
constexpr int ROWS_PER_WARP = 16;                            // that a warp finishes
// Tiles of rows that take turns, so that a part of the weight is used again while it is cached.
constexpr int GROUP = 8;

// The type of the sums and the bytes of a number, for operands of type T.
template <typename T>
struct Operand {
    using Sum = float;
    static constexpr int BYTES = 2;
};
template <>
struct Operand<int8_t> {
    using Sum = int32_t;
    static constexpr int BYTES = 1;
};
template <>
struct Operand<Float8> {
    using Sum = float;
    static constexpr int BYTES = 1;
};

struct Plan {
    int rows_of_tile, columns_of_tile;
    int log_x, log_y;  // of the box; what is left are images
    int tiles_x, tiles_y, row_tiles, column_tiles;
    int blocks[2], steps;          // blocks of channels per tap and source; steps of the whole sum
    int splits, share;             // blocks of threads that share a sum, and their steps
    int64_t rows, weight_columns;  // output positions; K
    int64_t out_columns;
    bool four_at_once;  // four columns of out and residual are aligned
    bool wide;          // the epilogue takes eight
};

// One block's work: a tile of the result and a range of steps.
struct Tile {
    int image, y, x, column, split, begin, end;
};

__device__ inline Tile tile_of(const Plan& plan, int index) {
    Tile tile;
    const int tiles = plan.row_tiles * plan.column_tiles;
    tile.split = index / tiles, index -= tile.split * tiles;
    const int group = index / (GROUP * plan.column_tiles), rest = index - group * GROUP * plan.column_tiles;
    const int tall = plan.row_tiles - group * GROUP < GROUP ? plan.row_tiles - group * GROUP : GROUP;
    const int row = group * GROUP + rest % tall;
    tile.column = rest / tall * plan.columns_of_tile;
    const int line = row / plan.tiles_x;
    tile.x = (row - line * plan.tiles_x) << plan.log_x;
    tile.y = (line % plan.tiles_y) << plan.log_y;
    tile.image = line / plan.tiles_y * (plan.rows_of_tile >> (plan.log_x + plan.log_y));
    tile.begin = tile.split * plan.share;
    tile.end = plan.steps - tile.begin < plan.share ? plan.steps : tile.begin + plan.share;
    return tile;
}

struct Position {
    int image, y, x;
};

// The output position of a row of the tile; it may be outside of the result.
__device__ inline Position position_of(const Plan& plan, const Tile& tile, int row) {
    return {tile.image + (row >> (plan.log_x + plan.log_y)), tile.y + (row >> plan.log_x & ((1 << plan.log_y) - 1)),
            tile.x + (row & ((1 << plan.log_x) - 1))};
}

__device__ inline bool inside(const CudaGemm& p, const Position& at) {
    return at.image < p.batch && at.y < p.out_height && at.x < p.out_width;
}

// Where a step is: source, tap and the first byte of its block of channels.
template <int BYTES>
struct Step {
    int source, dy, dx, block;

    __device__ Step(const CudaGemm& p, const Plan& plan, int index) {
        const int taps = int(p.kernel_height * p.kernel_width), first = taps * plan.blocks[0];
        source = index >= first;
        index -= source * first;
        const int blocks = plan.blocks[source], tap = blocks ? index / blocks : 0;
        block = index - tap * blocks;
        dy = tap / int(p.kernel_width), dx = tap - dy * int(p.kernel_width);
    }

    // The next step; returns whether the source or the tap is another.
    __device__ bool advance(const CudaGemm& p, const Plan& plan) {
        if (++block < plan.blocks[source]) return false;
        block = 0;
        if (++dx < p.kernel_width) return true;
        dx = 0;
        if (++dy < p.kernel_height) return true;
        dy = 0, source = 1;
        return true;
    }

    // In elements: the first channel, the column of the weight that belongs to it, and the channels from there on.
    __device__ int channel() const { return block * (STEP_BYTES / BYTES); }
    __device__ int weight_column(const CudaGemm& p) const {
        const int tap = dy * int(p.kernel_width) + dx;
        return tap * int(p.channels[0] + p.channels[1]) + source * int(p.channels[0]) + channel();
    }
    __device__ int channels_left(const CudaGemm& p) const { return int(p.channels[source]) - channel(); }
    // Parts of the block that have channels.
    __device__ int parts(const CudaGemm& p) const {
        const int left = (channels_left(p) * BYTES + PART_BYTES - 1) / PART_BYTES;
        return left < STEP_BYTES / PART_BYTES ? left : STEP_BYTES / PART_BYTES;
    }
};

}  // namespace vpd::gemm
