// GEMM with wgmma on sm_90a. One warp starts copies by TMA, two warpgroups multiply 64 rows each.
//
// A step of a tile's rows is one box of the image, at the tap's offset: TMA walks (channel, column, row, image) with the
// stride of the convolution, and fills with zeros what lies beyond the image or its channels. So neither patches nor
// padding exist anywhere, and a position costs no arithmetic. Boxes lie in shared memory with the swizzle of 128 bytes, as
// wgmma reads them.
//
// WIDE: the wide epilogue, and copies by a loop over sources and taps, then over channels, that one elected thread runs, so
// that the compiler keeps addresses in uniform registers. Also with tiles of 160 columns.
//
// Steps go through a ring of stages: `filled` says that a stage's bytes have come, `emptied` that both warpgroups are done
// with it. Two blocks share a multiprocessor where registers allow, so that one multiplies while the other finishes; with
// one warp for the copies they do without moving registers between warps (288 threads have 96 each, or 168 for one block).
#pragma once

#include "cuda/gemm_epilogue_wide.cuh"
#include "cuda/gemm_kernels.h"
#include "cuda/hopper.cuh"

namespace vpd::gemm {

template <typename T, int COLUMNS>
struct WgmmaTile {
    static constexpr int ROWS = 128, MULTIPLYING = 256, THREADS = MULTIPLYING + WARP;
    static constexpr int BLOCKS = blocks_per_processor(COLUMNS, std::is_same_v<T, Float8>);
    static constexpr int LEFT_BYTES = ROWS * STEP_BYTES, STAGE_BYTES = LEFT_BYTES + COLUMNS * STEP_BYTES;
    static constexpr int STAGES = (BLOCKS == 2 ? 104 : 208) * 1024 / STAGE_BYTES;
    static constexpr int ALIGNMENT = 1024;  // of what is swizzled
    static constexpr int SHARED_BYTES = ALIGNMENT + STAGES * STAGE_BYTES + 2 * STAGES * 8;
    // The wide epilogue's rows and columns lie behind the barriers.
    static constexpr int WIDE_BYTES = SHARED_BYTES + int(sizeof(TileColumns<COLUMNS>)) + ROWS * int(sizeof(WideRow));
    static_assert(BLOCKS * (WIDE_BYTES + 1024) <= 228 * 1024 && STAGES * 16 % alignof(TileColumns<COLUMNS>) == 0);
    static_assert(epilogue_bytes(ROWS, COLUMNS) <= STAGES * STAGE_BYTES && STAGES >= 3);
};

// The matrix descriptor of rows of 128 bytes with their swizzle, groups of 8 rows behind each other. Addresses of blocks of a
// cluster differ in higher bits.
__device__ inline uint64_t descriptor(const void* shared) {
    constexpr uint64_t EIGHT_ROWS = 8 * STEP_BYTES;
    return uint64_t(shared_address(shared) >> 4 & 0x3fff) | uint64_t(1) << 16 | EIGHT_ROWS >> 4 << 32 |
           uint64_t(1) << 62;
}

template <typename T, int COLUMNS>
__device__ inline void copy_steps(const TensorMaps& maps, const CudaGemm& p, const Plan& plan, const Tile& tile,
                                  unsigned char* stages, uint64_t* filled, uint64_t* emptied) {
    using Size = WgmmaTile<T, COLUMNS>;
    Step<Operand<T>::BYTES> step(p, plan, tile.begin);
    const int y = tile.y * int(p.stride) - int(p.top), x = tile.x * int(p.stride) - int(p.left);
    int stage = 0, round = 0;
    for (int i = tile.begin; i < tile.end; ++i) {
        if (round) barrier_wait(emptied + stage, (round - 1) & 1);
        unsigned char* const left = stages + stage * Size::STAGE_BYTES;
        barrier_expect(filled + stage, Size::STAGE_BYTES);
        load_box(left, maps.source[step.source], filled + stage, step.channel(), x + step.dx, y + step.dy, tile.image);
        load_box(left + Size::LEFT_BYTES, maps.weight, filled + stage, step.weight_column(p), tile.column);
        step.advance(p, plan);
        if (++stage == Size::STAGES) stage = 0, ++round;
    }
}

// As copy_steps, by one thread that the compiler knows to be one. The barriers of emptied stages follow those of filled.
template <typename T, int COLUMNS>
__device__ inline void copy_taps(const TensorMaps& maps, const CudaGemm& p, const Plan& plan, const Tile& tile,
                                 unsigned char* stages, uint64_t* filled) {
    using Size = WgmmaTile<T, COLUMNS>;
    constexpr int BYTES = Operand<T>::BYTES;
    Step<BYTES> step(p, plan, tile.begin);
    const int y = tile.y * int(p.stride) - int(p.top), x = tile.x * int(p.stride) - int(p.left);
    uint64_t* full = filled;
    unsigned char* to = stages;
    int stages_left = Size::STAGES;  // of the ring's round
    unsigned parity = 1;             // of the phase before the first, which counts as ended
    for (int left = tile.end - tile.begin; left > 0; step.next_tap(p)) {
        int blocks = plan.blocks[step.source] - step.block;
        blocks = blocks < left ? blocks : left;
        left -= blocks;
        const TensorMap& source = maps.source[step.source];
        const int from_x = x + step.dx, from_y = y + step.dy;
        int channel = step.channel(), column = step.weight_column(p);
        for (; blocks > 0; --blocks) {
            barrier_wait(full + Size::STAGES, parity);
            barrier_expect(full, Size::STAGE_BYTES);
            load_box(to, source, full, channel, from_x, from_y, tile.image);
            load_box(to + Size::LEFT_BYTES, maps.weight, full, column, tile.column);
            channel += STEP_BYTES / BYTES, column += STEP_BYTES / BYTES;
            ++full, to += Size::STAGE_BYTES;
            if (--stages_left == 0) stages_left = Size::STAGES, full = filled, to = stages, parity ^= 1;
        }
    }
}

// Sums of 64 rows by the warpgroup `group`.
template <typename T, int COLUMNS>
__device__ inline void multiply_steps(typename Operand<T>::Sum (&sums)[COLUMNS / 2], const CudaGemm& p,
                                      const Plan& plan, const Tile& tile, const unsigned char* stages, uint64_t* filled,
                                      uint64_t* emptied, int group, int lane) {
    using Size = WgmmaTile<T, COLUMNS>;
    using Sum = typename Operand<T>::Sum;
    // Tensor cores add up products of float8 with about 14 bits, so their sums of 128 columns move to float32.
    constexpr bool TWICE = std::is_same_v<T, Float8>;
    Sum few[TWICE ? COLUMNS / 2 : 1];
    Step<Operand<T>::BYTES> step(p, plan, tile.begin);
    int stage = 0, round = 0;
#pragma unroll
    for (int j = 0; j < COLUMNS / 2; ++j) sums[j] = 0;
    for (int i = tile.begin; i < tile.end; ++i) {
        const unsigned char* const left = stages + stage * Size::STAGE_BYTES;
        const uint64_t a = descriptor(left + group * 64 * STEP_BYTES), b = descriptor(left + Size::LEFT_BYTES);
        const int parts = step.parts(p);
        step.advance(p, plan);
        barrier_wait(filled + stage, round & 1);
        wgmma_begin();
        const auto multiply = [&](int part) {
            const int further = part * (PART_BYTES >> 4);
            if constexpr (TWICE)
                multiply_add_wide<T>(few, a + further, b + further, part > 0);
            else
                multiply_add_wide<T>(sums, a + further, b + further, true);
        };
        if (parts == STEP_BYTES / PART_BYTES) {
#pragma unroll
            for (int part = 0; part < STEP_BYTES / PART_BYTES; ++part) multiply(part);
            wgmma_commit();  // in each branch, else the compiler makes it an instruction of its own
        } else {             // beyond the channels there are zeros, of which whole parts are left out
#pragma unroll 1
            for (int part = 0; part < parts; ++part) multiply(part);
            wgmma_commit();
        }
        int done = stage;
        if constexpr (TWICE) {
            wgmma_wait<0>(few);
#pragma unroll
            for (int j = 0; j < COLUMNS / 2; ++j) sums[j] += few[j];
        } else {
            wgmma_wait<1>(sums);
            done = i == tile.begin ? -1 : (stage ? stage : Size::STAGES) - 1;
        }
        if (lane == 0 && done >= 0) barrier_arrive(emptied + done);
        if (++stage == Size::STAGES) stage = 0, ++round;
    }
    if constexpr (!TWICE) wgmma_wait<0>(sums);
}

// Adds the sums of all blocks of the cluster, in their order, in the rows that this block finishes. Each block reads those
// rows only, in the memory of all.
template <typename Sum, int COLUMNS>
__device__ inline void add_sums_of_cluster(Sum* staged, int blocks, int first_row, int rows, int thread, int threads) {
    for (int i = thread; i < rows * COLUMNS; i += threads) {
        Sum* const place = staged + (first_row + i / COLUMNS) * pitch_of(COLUMNS) + i % COLUMNS;
        float parts[MAX_CLUSTER];
#pragma unroll
        for (int rank = 0; rank < MAX_CLUSTER; ++rank)
            if (rank < blocks) parts[rank] = load_from_cluster(reinterpret_cast<const float*>(place), rank);
        Sum total = 0;
#pragma unroll
        for (int rank = 0; rank < MAX_CLUSTER; ++rank) {
            Sum part;
            memcpy(&part, &parts[rank], 4);
            if (rank < blocks) total += part;
        }
        *place = total;
    }
}

template <typename T, int COLUMNS, bool WIDE>
__global__ void __launch_bounds__(WgmmaTile<T, COLUMNS>::THREADS, WgmmaTile<T, COLUMNS>::BLOCKS)
    wgmma_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ CudaGemm p,
                 const __grid_constant__ Plan plan) {
#if VPD_HOPPER
    using Size = WgmmaTile<T, COLUMNS>;
    using Sum = typename Operand<T>::Sum;
    // Known to be the same in a warp, else the compiler takes what follows for divergent and makes wgmma wait.
    const int group = same_in_warp(threadIdx.x / 128);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned char* const memory = dynamic_shared();
    unsigned char* const stages = memory + (-shared_address(memory) & (Size::ALIGNMENT - 1));
    uint64_t* const filled = reinterpret_cast<uint64_t*>(stages + Size::STAGES * Size::STAGE_BYTES);
    uint64_t* const emptied = filled + Size::STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Size::STAGES; ++i) {
            barrier_init(filled + i, 1);
            barrier_init(emptied + i, Size::MULTIPLYING / WARP);
        }
        barrier_init_done();
        if constexpr (WIDE) {
            prefetch_tensor_map(maps.source[0]);
            if (p.channels[1]) prefetch_tensor_map(maps.source[1]);
            prefetch_tensor_map(maps.weight);
        }
    }
    __syncthreads();
    // The blocks of a cluster share a tile; where there are none, all have their own.
    const int blocks = WIDE ? 1 << plan.log_cluster : 1, rank = WIDE ? int(blockIdx.x) & (blocks - 1) : 0;
    const Tile tile = WIDE ? tile_of(plan, (blockIdx.x >> plan.log_cluster) + rank * plan.row_tiles * plan.column_tiles)
                           : tile_of(plan, blockIdx.x);
    if (group == Size::MULTIPLYING / 128) {
        if constexpr (WIDE) {
            if (elected())
                copy_taps<T, COLUMNS>(maps, p, plan, tile, stages,
                                      filled);  // a cluster's barriers leave out who has ended
        } else {
            if (lane == 0) copy_steps<T, COLUMNS>(maps, p, plan, tile, stages, filled, emptied);
        }
        return;
    }
    TileColumns<COLUMNS>& columns = *reinterpret_cast<TileColumns<COLUMNS>*>(emptied + Size::STAGES);
    WideRow* const rows = reinterpret_cast<WideRow*>(&columns + 1);
    if constexpr (WIDE) {  // while the first copies are on their way
        load_columns<T>(p, tile, columns, threadIdx.x, Size::MULTIPLYING);
        const int row = warp * ROWS_PER_WARP + lane;
        if (lane < ROWS_PER_WARP) rows[row] = wide_row_of<T>(p, plan, position_of(plan, tile, row));
        sync_threads(1, Size::MULTIPLYING);
    }
    Sum sums[COLUMNS / 2];
    multiply_steps<T, COLUMNS>(sums, p, plan, tile, stages, filled, emptied, group, lane);
    // Both warpgroups are done with the operands, whose place the sums take. The copies have all come.
    sync_threads(1, Size::MULTIPLYING);
    Sum* const staged = reinterpret_cast<Sum*>(stages);
    Sum* const fragment = staged + (warp * ROWS_PER_WARP + lane / 4) * pitch_of(COLUMNS) + lane % 4 * 2;
    if constexpr (WIDE) {
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i += 2)
            *reinterpret_cast<Two<Sum>*>(fragment + i / 2 % 2 * 8 * pitch_of(COLUMNS) + i / 4 * 8) = {sums[i],
                                                                                                      sums[i + 1]};
        sync_warp();
        const int finished = Size::ROWS >> plan.log_cluster, first_row = rank * finished;  // rows of this block
        if (blocks > 1) {
            cluster_arrive(), cluster_wait();  // all sums are there
            add_sums_of_cluster<Sum, COLUMNS>(staged, blocks, first_row, finished, threadIdx.x, Size::MULTIPLYING);
            cluster_arrive();
            sync_threads(1, Size::MULTIPLYING);
        }
        const bool finishes = warp * ROWS_PER_WARP - first_row >= 0 && warp * ROWS_PER_WARP < first_row + finished;
        if (finishes) wide_epilogue<T>(p, plan, tile, staged, rows, columns, warp, lane);
        if (plan.statistics) {
            sync_warp();
            if (finishes) statistics_of_warp<Sum, COLUMNS>(staged + warp * ROWS_PER_WARP * pitch_of(COLUMNS), lane);
            sync_threads(1, Size::MULTIPLYING);
            store_statistics<Sum, COLUMNS>(p, plan, tile, staged, first_row, finished, threadIdx.x, Size::MULTIPLYING);
        }
        if (blocks > 1) cluster_wait();  // others may still read the sums
    } else {
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) fragment[i / 2 % 2 * 8 * pitch_of(COLUMNS) + i / 4 * 8 + i % 2] = sums[i];
        sync_warp();
        ResultRow* const result_rows = reinterpret_cast<ResultRow*>(staged + Size::ROWS * pitch_of(COLUMNS));
        tile_epilogue<T, COLUMNS>(p, plan, tile, staged, result_rows, warp, lane);
    }
#endif
}

}  // namespace vpd::gemm
