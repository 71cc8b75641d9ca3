// GEMM with mma.sync: rows and weight are gathered 16 bytes at a time by cp.async, some steps ahead.
#pragma once

#include "cuda/gemm_epilogue.cuh"

namespace vpd::gemm {

// A tile of SIDE rows and SIDE columns; each warp computes half of its rows and 32 of its columns.
template <int SIDE>
struct MmaTile {
    static constexpr int WARPS = SIDE / 16, THREADS = WARPS * WARP, STAGES = SIDE == 128 ? 3 : 4;
    static constexpr int HALF_BYTES = SIDE * STEP_BYTES;  // of a stage: its rows, then its columns
    static constexpr int SHARED_BYTES = STAGES * 2 * HALF_BYTES;
    static_assert(epilogue_bytes(SIDE, SIDE) <= SHARED_BYTES);
};

constexpr int PIECE = 16, PIECES = STEP_BYTES / PIECE;  // bytes of a copy; copies of a row

// Rows of 128 bytes in shared memory: the 16 bytes `piece` of row `row` lie where 8 rows' same pieces hit all banks.
__device__ inline int swizzled(int row, int piece) { return row * STEP_BYTES + ((piece ^ (row & 7)) * PIECE); }

// What a thread copies: the same piece of every (THREADS / 8)th row and column of the tile.
template <typename T, int SIDE>
struct Loader {
    static constexpr int BYTES = Operand<T>::BYTES, COPIES = SIDE * PIECES / MmaTile<SIDE>::THREADS;
    static constexpr int ROWS_APART = SIDE / COPIES;

    const CudaGemm& p;
    const Plan& plan;
    const Tile& tile;
    Step<BYTES> step;
    const int piece, first;
    const char* rows[COPIES];  // the first channel under the current tap
    unsigned valid_rows;       // a bit for each row that lies inside of the image under the current tap

    __device__ Loader(const CudaGemm& p_, const Plan& plan_, const Tile& tile_)
        : p(p_),
          plan(plan_),
          tile(tile_),
          step(p_, plan_, tile_.begin),
          piece(threadIdx.x % PIECES),
          first(threadIdx.x / PIECES) {
        find_rows();
    }

    __device__ __forceinline__ void find_rows() {
        const CudaPositions& source = p.source[step.source];
        valid_rows = 0;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const Position at = position_of(plan, tile, first + i * ROWS_APART);
            const int64_t y = at.y * p.stride - p.top + step.dy, x = at.x * p.stride - p.left + step.dx;
            const bool valid = inside(p, at) && y >= 0 && y < p.height && x >= 0 && x < p.width;
            valid_rows |= unsigned(valid) << i;
            const int64_t offset = valid ? at.image * source.image + y * source.row + x * source.column : 0;
            rows[i] = static_cast<const char*>(source.data) + offset * BYTES;
        }
    }

    // Starts copying the current step and goes on to the next.
    __device__ __forceinline__ void load(unsigned char* stage) {
        const bool in_channels = piece * (PIECE / BYTES) < step.channels_left(p);
        const int channel = step.channel() + piece * (PIECE / BYTES);
#pragma unroll
        for (int i = 0; i < COPIES; ++i)
            async_copy_16(stage + swizzled(first + i * ROWS_APART, piece), rows[i] + channel * BYTES,
                          in_channels && (valid_rows >> i & 1));
        const int64_t place = step.weight_column(p) + piece * (PIECE / BYTES);
        const char* const weight = static_cast<const char*>(p.weight);
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int column = tile.column + first + i * ROWS_APART;
            const bool valid = in_channels && column < p.n;
            async_copy_16(stage + MmaTile<SIDE>::HALF_BYTES + swizzled(first + i * ROWS_APART, piece),
                          valid ? weight + (column * plan.weight_columns + place) * BYTES : weight, valid);
        }
        if (step.advance(p, plan)) find_rows();
    }
};

template <typename T, int SIDE>
__global__ void __launch_bounds__(MmaTile<SIDE>::THREADS)
    mma_kernel(const __grid_constant__ CudaGemm p, const __grid_constant__ Plan plan) {
    using Sum = typename Operand<T>::Sum;
    using Size = MmaTile<SIDE>;
    constexpr int BYTES = Operand<T>::BYTES, TALL = SIDE / 2 / 16;  // fragments of 16 rows
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int row0 = warp % 2 * (SIDE / 2), column0 = warp / 2 * 32;
    unsigned char* const shared = dynamic_shared();
    const Tile tile = tile_of(plan, blockIdx.x);
    const int steps = tile.end - tile.begin;

    Sum sums[TALL][4][4];
#pragma unroll
    for (int i = 0; i < TALL * 16; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0;

    Loader<T, SIDE> loader(p, plan, tile);
#pragma unroll 1
    for (int i = 0; i < Size::STAGES - 1; ++i) {
        if (i < steps) loader.load(shared + i * 2 * Size::HALF_BYTES);
        async_commit();
    }
    Step<BYTES> step(p, plan, tile.begin);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        async_wait<Size::STAGES - 2>();
        __syncthreads();  // this step has come, and everyone has left the one before it
        const int ahead = i + Size::STAGES - 1;
        if (ahead < steps) loader.load(shared + ahead % Size::STAGES * 2 * Size::HALF_BYTES);
        async_commit();
        const unsigned char* const left = shared + i % Size::STAGES * 2 * Size::HALF_BYTES;
        const unsigned char* const right = left + Size::HALF_BYTES;
        const int parts = step.parts(p);
        step.advance(p, plan);
#pragma unroll
        for (int part = 0; part < STEP_BYTES / PART_BYTES; ++part) {
            if (part >= parts) break;
            uint32_t a[TALL][4], b[2][4];
#pragma unroll
            for (int j = 0; j < TALL; ++j)
                load_matrices(a[j], left + swizzled(row0 + j * 16 + lane % 16, part * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < 2; ++j)
                load_matrices(b[j],
                              right + swizzled(column0 + j * 16 + lane % 8 + lane / 16 * 8, part * 2 + lane / 8 % 2));
#pragma unroll
            for (int j = 0; j < TALL; ++j)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    multiply_add<T>(sums[j][k], a[j], b[k / 2][k % 2 * 2], b[k / 2][k % 2 * 2 + 1]);
        }
    }

    async_wait<0>();
    __syncthreads();  // the sums take the place of the operands
    Sum* const staged = reinterpret_cast<Sum*>(shared);
#pragma unroll
    for (int j = 0; j < TALL; ++j)
#pragma unroll
        for (int i = 0; i < 16; ++i)
            staged[(row0 + j * 16 + lane / 4 + i / 2 % 2 * 8) * pitch_of(SIDE) + column0 + i / 4 * 8 + lane % 4 * 2 +
                   i % 2] = sums[j][i / 4][i % 4];
    __syncthreads();
    tile_epilogue<T, SIDE>(p, plan, tile, staged, reinterpret_cast<ResultRow*>(staged + SIDE * pitch_of(SIDE)), warp,
                           lane);
}

}  // namespace vpd::gemm
