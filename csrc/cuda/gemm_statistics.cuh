// Statistics of the result, found by the product that makes it: of each column in runs of output positions, from the
// numbers as they are stored, which the wide epilogue puts back in place of the sums.
//
// Each warp finds those of its 16 rows, in two passes over registers; then those of the warps of a run are put together
// (Chan, Golub, LeVeque, 1979). Nothing depends on the order of warps. Planes are those of kernels/_statistics.py: mean,
// its rounding error, sum of squared deviations, minimum and maximum, which ignore NaN.
#pragma once

#include "cuda/gemm_epilogue.cuh"

namespace vpd::gemm {

constexpr int PLANES = 5;

// The memory of a sum as a number that is no sum.
template <typename Sum>
__device__ inline float number_in(const Sum& place) {
    float number;
    memcpy(&number, &place, 4);
    return number;
}
template <typename Sum>
__device__ inline void put_number(Sum& place, float number) {
    memcpy(&place, &number, 4);
}

// Of a warp's rows, in place of the first PLANES of them.
template <typename Sum, int COLUMNS>
__device__ inline void statistics_of_warp(Sum* rows, int lane) {
    constexpr float SHARE = 1.0f / ROWS_PER_WARP;
#pragma unroll 1
    for (int column = lane; column < COLUMNS; column += WARP) {
        float x[ROWS_PER_WARP], mean = 0, rest = 0, squares = 0, low = INFINITY, high = -INFINITY;
#pragma unroll
        for (int i = 0; i < ROWS_PER_WARP; ++i) x[i] = number_in(rows[i * pitch_of(COLUMNS) + column]);
#pragma unroll
        for (int i = 0; i < ROWS_PER_WARP; ++i) mean += x[i];
        mean *= SHARE;
#pragma unroll
        for (int i = 0; i < ROWS_PER_WARP; ++i) {
            const float difference = x[i] - mean;
            rest += difference, squares += difference * difference;
            low = fminf(low, x[i]), high = fmaxf(high, x[i]);
        }
        const float planes[] = {mean, rest * SHARE, squares - rest * rest * SHARE, low, high};
#pragma unroll
        for (int i = 0; i < PLANES; ++i) put_number(rows[i * pitch_of(COLUMNS) + column], planes[i]);
    }
}

// Where the first plane of the run at that position goes, of that column.
__device__ inline float* place_of_run(const CudaGemm& p, const Plan& plan, const Position& at, int column) {
    const int number = (at.image * int(p.out_height) + at.y) * int(p.out_width) + at.x;
    const int run = number >> plan.log_run, image = run / plan.by_runs;
    return p.statistics + image * p.statistics_image + int64_t(run - image * plan.runs) * PLANES * p.n + column;
}

// Of all runs in `rows` rows of a tile, whole runs from `first_row` on, from those of their warps; by `threads` threads.
template <typename Sum, int COLUMNS>
__device__ inline void store_statistics(const CudaGemm& p, const Plan& plan, const Tile& tile, const Sum* staged,
                                        int first_row, int rows, int thread, int threads) {
    const int warps = 1 << (plan.log_run - 4);  // of a run
    static_assert(ROWS_PER_WARP == 16);
    for (int i = thread; i < rows / ROWS_PER_WARP / warps * COLUMNS; i += threads) {
        const int run = i / COLUMNS, column = i - run * COLUMNS, row = first_row + (run << plan.log_run);
        const Position at = position_of(plan, tile, row);
        if (tile.column + column >= p.n || !inside(p, at)) continue;
        const Sum* const first = staged + row * pitch_of(COLUMNS) + column;
        const auto part = [&](int warp, int plane) {
            return number_in(first[(warp * ROWS_PER_WARP + plane) * pitch_of(COLUMNS)]);
        };
        float mean = 0, rest = 0, squares = 0, low = INFINITY, high = -INFINITY;
        for (int warp = 0; warp < warps; ++warp) mean += part(warp, 0);
        mean /= float(warps);
        for (int warp = 0; warp < warps; ++warp) {
            const float difference = (part(warp, 0) - mean) + part(warp, 1);
            rest += difference, squares += part(warp, 2) + ROWS_PER_WARP * difference * difference;
            low = fminf(low, part(warp, 3)), high = fmaxf(high, part(warp, 4));
        }
        rest /= float(warps);
        squares -= float(warps * ROWS_PER_WARP) * rest * rest;
        float* const to = place_of_run(p, plan, at, tile.column + column);
        const float planes[] = {mean, rest, squares, low, high};
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) store_global(to + plane * p.n, planes[plane]);
    }
}

// Of COUNT columns, of some positions of a run, one after the other: about `shift`, the first one's number.
template <int COUNT>
struct RunningStatistics {
    float shift[COUNT], total[COUNT], squares[COUNT], low[COUNT], high[COUNT];

    __device__ void begin(const float (&first)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            shift[i] = first[i], total[i] = squares[i] = 0.0f, low[i] = INFINITY, high[i] = -INFINITY;
        }
    }
    __device__ void add(const float (&x)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float difference = x[i] - shift[i];
            total[i] += difference, squares[i] = fmaf(difference, difference, squares[i]);
            low[i] = fminf(low[i], x[i]), high[i] = fmaxf(high[i], x[i]);
        }
    }
    // to: the first plane of the first column; planes are `n` apart. share: of a position in all.
    __device__ void store(float* to, int64_t n, float share) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float off = total[i] * share, mean = shift[i] + off, taken = mean - shift[i];
            const float rest = (shift[i] - (mean - taken)) + (off - taken);  // what rounding the mean took away
            const float planes[] = {mean, rest, squares[i] - total[i] * off, low[i], high[i]};
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) store_global(to + plane * n + i, planes[plane]);
        }
    }
};

}  // namespace vpd::gemm
