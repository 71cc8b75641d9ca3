// What kernels of cross_attention_maps have in common: which queries and heads a block has, and how sums of
// probabilities over heads, in shared memory, become maps.
#pragma once

#include "cuda/attention_maps_plan.h"
#include "cuda/primitives.cuh"

namespace vpd::attention_maps {

using namespace device;

// Of float32 sums over heads in shared memory; odd, so that columns are spread over the banks.
constexpr __host__ __device__ int sums_pitch(int tokens) { return tokens + 1; }

// What a block computes: some heads of a tile of queries.
struct BlockTile {
    int64_t tile, image, row0;
    int group, head0, head_end;  // which of the blocks that share the tile's heads it is
    int rows, valid_rows;

    __device__ BlockTile(const CudaCrossAttentionMaps& p, const MapsPlan& plan, int rows_of_tile)
        : tile(blockIdx.x / plan.groups),
          image(tile / plan.tiles_per_image),
          row0(tile % plan.tiles_per_image * rows_of_tile),
          group(blockIdx.x % plan.groups),
          head0(int(p.heads * group / plan.groups)),
          head_end(int(p.heads * (group + 1) / plan.groups)),
          rows(rows_of_tile),
          valid_rows(p.queries - row0 < rows ? int(p.queries - row0) : rows) {}
};

__device__ inline void store_map(const CudaCrossAttentionMaps& p, int64_t offset, float value) {
    switch (p.maps_dtype) {
        case CudaFloat::float32: store_global(static_cast<float*>(p.maps) + offset, value); break;
        case CudaFloat::bfloat16:
            store_global(static_cast<Bfloat16*>(p.maps) + offset, from_float<Bfloat16>(value));
            break;
        case CudaFloat::float16:
            store_global(static_cast<Float16*>(p.maps) + offset, from_float<Float16>(value));
            break;
    }
}

__device__ inline int64_t map_offset(const CudaMapStrides& s, int64_t image, int64_t head, int64_t row, int column) {
    return image * s.image + head * s.head + row * s.row + column * s.column;
}

__device__ inline float column_sum(const CudaCrossAttentionMaps& p, const float* sums, int column) {
    if (!p.category_offsets) return sums[column];
    float total = 0.0f;
    const int end = load_global(p.category_offsets + column + 1);
#pragma unroll 4
    for (int i = load_global(p.category_offsets + column); i < end; ++i)
        total += sums[load_global(p.category_tokens + i)];
    return total * load_global(p.category_weights + column);
}

// A warp writes two rows at a time of maps whose columns are tokens.
__device__ inline void write_token_rows(const CudaCrossAttentionMaps& p, const MapsPlan& plan, const float* sums,
                                        int pitch, int64_t image, int64_t head, int64_t row0, int rows, int threads) {
    constexpr int WARP = 32, ROWS = 2, PIECES = 5;  // loads of addends in flight: 160 columns at a time
    float* const maps = static_cast<float*>(p.maps);
    for (int first = int(threadIdx.x) / WARP * ROWS; first < rows; first += threads / WARP * ROWS) {
        const int64_t to = map_offset(p.maps_strides, image, head, row0 + first, 0);
        const int64_t from = p.addend ? map_offset(p.addend_strides, image, head, row0 + first, 0) : 0;
        for (int lane = threadIdx.x % WARP; lane < plan.columns; lane += WARP * PIECES) {
            float old[ROWS][PIECES];
#pragma unroll
            for (int i = 0; i < ROWS * PIECES; ++i) {
                const int row = i / PIECES, column = lane + i % PIECES * WARP;
                old[row][i % PIECES] = 0.0f;
                if (p.addend && first + row < rows && column < plan.columns)
                    old[row][i % PIECES] = load_global(p.addend + (from + row * p.addend_strides.row + column));
            }
#pragma unroll
            for (int i = 0; i < ROWS * PIECES; ++i) {
                const int row = i / PIECES, column = lane + i % PIECES * WARP;
                if (first + row < rows && column < plan.columns)
                    store_global(maps + (to + row * p.maps_strides.row + column),
                                 fmaf(plan.factor, sums[(first + row) * pitch + column], old[row][i % PIECES]));
            }
        }
    }
}

// The first `threads` threads of the block write the maps of queries row0 .. row0 + rows; sums: sums over heads of
// these rows, in shared memory.
__device__ inline void write_maps(const CudaCrossAttentionMaps& p, const MapsPlan& plan, const float* sums, int pitch,
                                  int64_t image, int64_t head, int64_t row0, int rows, int threads) {
    if (plan.token_rows) {
        write_token_rows(p, plan, sums, pitch, image, head, row0, rows, threads);
        return;
    }
    // Loads in flight; the compiler cannot move them before stores that may be to the same place.
    constexpr int BATCH = 8;
    const int count = rows * plan.columns;
    if (count <= 0) return;
    // Neighbouring threads take neighbours in memory: columns, or rows where the maps are channels of an NCHW tensor.
    const bool rows_first = p.maps_strides.row < p.maps_strides.column;
    const int inner = rows_first ? rows : plan.columns;
    const int outer_step = threads / inner, inner_step = threads % inner;
    int j = threadIdx.x / inner, i = threadIdx.x % inner;
    for (int first = threadIdx.x; first < count; first += BATCH * threads) {
        int row[BATCH], column[BATCH];
        float old[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            row[b] = rows_first ? i : j, column[b] = rows_first ? j : i;
            old[b] = 0.0f;
            if (p.addend && first + b * threads < count)
                old[b] = load_global(p.addend + map_offset(p.addend_strides, image, head, row0 + row[b], column[b]));
            i += inner_step, j += outer_step;
            if (i >= inner) i -= inner, ++j;
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
            if (first + b * threads < count)
                store_map(p, map_offset(p.maps_strides, image, head, row0 + row[b], column[b]),
                          fmaf(plan.factor, column_sum(p, sums + row[b] * pitch, column[b]), old[b]));
    }
}

// Puts a thread's sums, those of 16 rows of a warp as matrix instructions leave them, into shared memory: of every 8
// tokens those at 2 * (lane % 4) and the next, for rows lane / 4 and lane / 4 + 8. eighth: which 8 tokens.
__device__ inline void stage_sums(float* staged, int pitch, int eighth, int lane, const float* sums) {
#pragma unroll
    for (int i = 0; i < 4; ++i) staged[(lane / 4 + i / 2 * 8) * pitch + eighth * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// Makes maps of the sums over a block's heads, which its first `threads` threads have staged: alone, or with the other
// blocks that share the tile. sync: has these threads wait for each other; tokens: of a row of sums, padding included.
template <typename Sync>
__device__ inline void write_head_sums(const CudaCrossAttentionMaps& p, const MapsPlan& plan, const BlockTile& block,
                                       float* staged, int tokens, int threads, const Sync& sync) {
    const int pitch = sums_pitch(tokens);
    if (plan.head_sum == HeadSum::cluster) {
        cluster_arrive();
        cluster_wait();
        // Each block adds up and writes a part of the rows; nobody else reads these of its own.
        const int first = block.rows * block.group / plan.groups, end = block.rows * (block.group + 1) / plan.groups;
        constexpr int BATCH = 4;  // elements whose loads are in flight
        for (int i = threadIdx.x; i < (end - first) * tokens; i += BATCH * threads) {
            float* element[BATCH];
            float total[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int at = i + b * threads < (end - first) * tokens ? i + b * threads : i;
                element[b] = staged + (first + at / tokens) * pitch + at % tokens, total[b] = 0.0f;
            }
#pragma unroll 8
            for (int rank = 0; rank < plan.groups; ++rank)
#pragma unroll
                for (int b = 0; b < BATCH; ++b) total[b] += load_from_cluster(element[b], rank);
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
                if (i + b * threads < (end - first) * tokens) *element[b] = total[b];
        }
        cluster_arrive();
        sync();
        write_maps(p, plan, staged + first * pitch, pitch, block.image, 0, block.row0 + first,
                   (end < block.valid_rows ? end : block.valid_rows) - first, threads);
        cluster_wait();  // a block's memory must outlive the others' reads
        return;
    }
    sync();
    if (plan.head_sum == HeadSum::write) {
        write_maps(p, plan, staged, pitch, block.image, block.group, block.row0, block.valid_rows, threads);
        return;
    }
    const int valid = int(p.tokens);
    float* const partial =
        static_cast<float*>(p.scratch) + (block.tile * plan.groups + block.group) * block.rows * valid;
    for (int i = threadIdx.x; i < block.valid_rows * valid; i += threads)
        store_global(partial + i, staged[i / valid * pitch + i % valid]);
}

}  // namespace vpd::attention_maps
