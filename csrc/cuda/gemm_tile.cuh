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

// Division of numbers below 2^31 by one that is known when a kernel is launched: a multiplication and a shift.
struct Divisor {
    uint32_t multiplier;  // 2^shift / divisor, rounded up
    int shift;            // 31 + the binary logarithm of the divisor, rounded up
};

inline Divisor divisor_of(int64_t number) {
    int log = 0;
    while (int64_t(1) << log < number) ++log;
    return {uint32_t(((uint64_t(1) << (31 + log)) + number - 1) / number), 31 + log};
}

__device__ inline int operator/(int x, const Divisor& by) {
    return int(uint64_t(uint32_t(x)) * by.multiplier >> by.shift);
}

struct Plan {
    int rows_of_tile, columns_of_tile;
    int log_x, log_y;  // of the box; what is left are images
    int tiles_x, tiles_y, row_tiles, column_tiles;
    int blocks[2], steps;          // blocks of channels per tap and source; steps of the whole sum
    int splits, share;             // blocks of threads that share a sum through scratch memory, and their steps
    int log_cluster;               // binary logarithm of blocks that share a sum in a cluster, steps as above
    int64_t rows, weight_columns;  // output positions; K
    int64_t out_columns;
    bool four_at_once;  // four columns of out and residual are aligned
    bool wide;          // the epilogue takes eight
    bool persistent;    // blocks stay
    bool statistics;    // the kernel finds them
    int log_run, runs;  // of statistics: binary logarithm of a run's positions; runs of an image
    // By tiles of a split, tiles of a group of rows and rows of the last group, boxes along columns and rows, blocks of
    // each source, columns of the convolution's kernel, and runs of statistics of an image.
    Divisor by_runs, by_tiles, by_group, by_last_group, by_tiles_x, by_tiles_y, by_blocks[2], by_kernel_width;
};

// One block's work: a tile of the result and a range of steps.
struct Tile {
    int image, y, x, column, split, begin, end;
};

__device__ inline Tile tile_of(const Plan& plan, int index) {
    Tile tile;
    tile.split = index / plan.by_tiles, index -= tile.split * plan.row_tiles * plan.column_tiles;
    const int group = index / plan.by_group, rest = index - group * GROUP * plan.column_tiles;
    const int left = plan.row_tiles - group * GROUP, tall = left < GROUP ? left : GROUP;
    const int across = left < GROUP ? rest / plan.by_last_group : rest / GROUP;
    const int row = group * GROUP + rest - across * tall;
    tile.column = across * plan.columns_of_tile;
    const int line = row / plan.by_tiles_x, images = line / plan.by_tiles_y;
    tile.x = (row - line * plan.tiles_x) << plan.log_x;
    tile.y = (line - images * plan.tiles_y) << plan.log_y;
    tile.image = images * (plan.rows_of_tile >> (plan.log_x + plan.log_y));
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
        const int first = int(p.kernel_height * p.kernel_width) * plan.blocks[0];
        source = index >= first;
        index -= source * first;
        const int tap = index / plan.by_blocks[source];
        block = index - tap * plan.blocks[source];
        dy = tap / plan.by_kernel_width, dx = tap - dy * int(p.kernel_width);
    }

    // The next step; returns whether the source or the tap is another.
    __device__ bool advance(const CudaGemm& p, const Plan& plan) {
        if (++block < plan.blocks[source]) return false;
        next_tap(p);
        return true;
    }
    __device__ void next_tap(const CudaGemm& p) {
        block = 0;
        if (++dx < p.kernel_width) return;
        dx = 0;
        if (++dy < p.kernel_height) return;
        dy = 0, source = 1;
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
