// Kernel of cross_attention_maps with wgmma on sm_90a: a tile is 64 queries per warpgroup, against all tokens at once.
//
// One warp copies the heads' queries, keys and values by TMA, one head ahead, through maps of (channel, head, row,
// image) that end a head's channels and the tokens with zeros. A thread has the probabilities of two rows as matrix
// instructions leave them: it adds them up over heads in as many registers, and rounded they are the left operand of
// the product with the values. As there is one block of keys, the largest score is known before the first exponential.
// Rows of `out` leave through shared memory by TMA, 16 of each warp, which waits for no other.
#pragma once

#include "cuda/attention_maps_output.cuh"
#include "cuda/attention_rows.h"
#include "cuda/cross_attention_maps_wgmma.h"
#include "cuda/ring.cuh"
#include "cuda/softmax.cuh"
#include "cuda/wgmma_operands.cuh"

namespace vpd::attention_maps {

using attention::LINE_CHANNELS;

constexpr int WARP_THREADS = 32, GROUP_THREADS = 128, WARPS_PER_GROUP = 4, GROUP_ROWS = 64, ROWS_PER_STORE = 16;
// Sizes that kernels are compiled for; a problem runs in the smallest that holds it.
constexpr int WGMMA_TOKENS[] = {80, 160}, WGMMA_DIMS[] = {40, 80, 160};

// With fewer, a thread's sums, probabilities and results do not fit its registers.
constexpr int min_warpgroups(int tokens, int dim) { return tokens > 80 && dim > 80 ? 2 : 1; }

struct WgmmaMaps {
    TensorMap q, k, v, out;
};

struct WgmmaPlan : MapsPlan {
    bool shared;       // all images have the keys and values of the first
    float scale_log2;  // scale * log2(e), positive
};

// Sizes of a block of threads. A panel is 64 channels of all rows; a stage of queries has the keys of the same head.
template <int TOKENS, int DIM, int WARPGROUPS>
struct WgmmaTile {
    static_assert(WARPGROUPS >= min_warpgroups(TOKENS, DIM) && WARPGROUPS <= 2);
    static constexpr int COMPUTING = WARPGROUPS * GROUP_THREADS, THREADS = COMPUTING + GROUP_THREADS;
    static constexpr int ROWS = WARPGROUPS * GROUP_ROWS;
    static constexpr int PANELS = (DIM + LINE_CHANNELS - 1) / LINE_CHANNELS;
    static constexpr int QUERY_PANEL = ROWS * LINE_BYTES, TOKEN_PANEL = TOKENS * LINE_BYTES;
    static constexpr int QUERY_BYTES = PANELS * QUERY_PANEL, TOKEN_BYTES = PANELS * TOKEN_PANEL;
    // Blocks that run side by side on a multiprocessor: as registers alone allow, and shared memory, too.
    static constexpr int BY_REGISTERS = WARPGROUPS == 2 ? 1 : TOKENS <= 80 && DIM <= 40 ? 3 : 2;
    static constexpr int RESIDENT = TOKENS > 80 && DIM > 40 ? 1 : BY_REGISTERS;
    // Registers of a thread, after the warpgroup that copies has given some away.
    static constexpr int FEW = 24, MANY = WARPGROUPS == 2 ? 240 : BY_REGISTERS == 3 ? 136 : 232;

    static constexpr int shared_bytes(int query_stages, int value_stages) {
        return SWIZZLE_ALIGNMENT + query_stages * (QUERY_BYTES + TOKEN_BYTES) + value_stages * TOKEN_BYTES +
               QUERY_BYTES + 2 * (query_stages + value_stages) * 8;
    }
    static constexpr int MAX_SHARED = 228 * 1024 / RESIDENT - 1024;
    static constexpr int QUERY_STAGES = shared_bytes(2, 1) <= MAX_SHARED ? 2 : 1;
    static constexpr int VALUE_STAGES = shared_bytes(QUERY_STAGES, 2) <= MAX_SHARED ? 2 : 1;
    static constexpr int SHARED_BYTES = shared_bytes(QUERY_STAGES, VALUE_STAGES);
    static_assert(SHARED_BYTES <= MAX_SHARED);
    // Sums lie where queries, keys and values were.
    static_assert(ROWS * sums_pitch(TOKENS) * 4 <=
                  QUERY_STAGES * (QUERY_BYTES + TOKEN_BYTES) + VALUE_STAGES * TOKEN_BYTES);

    using Queries = Ring<QUERY_STAGES, QUERY_BYTES + TOKEN_BYTES>;
    using Values = Ring<VALUE_STAGES, TOKEN_BYTES>;
};

template <typename Size>
struct WgmmaShared {
    typename Size::Queries queries;  // and keys
    typename Size::Values values;
    unsigned char* out;
    __device__ explicit WgmmaShared(unsigned char* memory) {
        using Queries = typename Size::Queries;
        queries.stages = memory + (-shared_address(memory) & (SWIZZLE_ALIGNMENT - 1));
        values.stages = queries.stages + Queries::STAGES * Queries::STAGE_BYTES;
        out = values.stages + Size::Values::STAGES * Size::Values::STAGE_BYTES;
        queries.barriers = reinterpret_cast<uint64_t*>(out + Size::QUERY_BYTES);
        values.barriers = queries.barriers + Queries::BARRIERS;
    }
};

// One thread copies what the heads of the block need, in that order.
template <typename Size>
__device__ inline void copy_heads(const WgmmaMaps& maps, const WgmmaPlan& plan, const WgmmaShared<Size>& shared,
                                  const BlockTile& block) {
    const int image = int(block.image), token_image = plan.shared ? 0 : image;
#pragma unroll 1
    for (int head = block.head0; head < block.head_end; ++head) {
        const auto query_place = Size::Queries::place_of(head - block.head0);
        const auto value_place = Size::Values::place_of(head - block.head0);
        shared.queries.begin_filling(query_place);
        unsigned char* const queries = shared.queries.at(query_place.stage);
        uint64_t* const filled = shared.queries.filled(query_place.stage);
#pragma unroll
        for (int panel = 0; panel < Size::PANELS; ++panel) {
            load_box(queries + panel * Size::QUERY_PANEL, maps.q, filled, panel * LINE_CHANNELS, head, int(block.row0),
                     image);
            load_box(queries + Size::QUERY_BYTES + panel * Size::TOKEN_PANEL, maps.k, filled, panel * LINE_CHANNELS,
                     head, 0, token_image);
        }
        shared.values.begin_filling(value_place);
#pragma unroll
        for (int panel = 0; panel < Size::PANELS; ++panel)
            load_box(shared.values.at(value_place.stage) + panel * Size::TOKEN_PANEL, maps.v,
                     shared.values.filled(value_place.stage), panel * LINE_CHANNELS, head, 0, token_image);
    }
}

// What a warpgroup computes.
template <typename T, int TOKENS, int DIM, int WARPGROUPS>
struct HeadsOfTile {
    using Size = WgmmaTile<TOKENS, DIM, WARPGROUPS>;
    static constexpr int SCORES = TOKENS / 2, STEPS = TOKENS / 16, PARTS = (DIM + 15) / 16;
    // The largest number of tokens that a smaller kernel takes.
    static constexpr int BELOW = TOKENS == WGMMA_TOKENS[0] ? 0 : WGMMA_TOKENS[0];
    const WgmmaShared<Size>& shared;
    const int group, warp, lane;  // warp: of the block
    float s[SCORES], sums[SCORES];

    __device__ HeadsOfTile(const WgmmaShared<Size>& shared_, int group_, int warp_, int lane_)
        : shared(shared_), group(group_), warp(warp_), lane(lane_) {
#pragma unroll
        for (int i = 0; i < SCORES; ++i) sums[i] = 0.0f;
    }

    // s = q k^T; the warp has then read both. turn: of the head, among those of the block.
    __device__ inline void find_scores(int turn) {
        const auto place = Size::Queries::place_of(turn);
        const unsigned char* const queries = shared.queries.at(place.stage);
        const uint64_t q = line_descriptor(queries + group * GROUP_ROWS * LINE_BYTES);
        const uint64_t k = line_descriptor(queries + Size::QUERY_BYTES);
        shared.queries.wait_until_filled(place);
        hold(s);
        wgmma_begin();
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int panel = part / 4, further = part % 4 * 32;
            multiply_add_wide<T>(s, q + ((panel * Size::QUERY_PANEL + further) >> 4),
                                 k + ((panel * Size::TOKEN_PANEL + further) >> 4), part > 0);
        }
        wgmma_commit();
        wgmma_wait<0>(s);
        if (lane == 0) shared.queries.release(place);
    }

    // Scores become exponentials, which also count in the sums over heads; returns 1 / sums of rows.
    __device__ inline void find_probabilities(float scale, int tokens, float (&inverse)[2]) {
        if (tokens > TOKENS - 16)
            mask_columns<TOKENS - 16>(s, tokens, lane);
        else
            mask_columns<BELOW>(s, tokens, lane);
        Largest largest;
        if (largest.include(s, scale))
            largest.exponentials_of_huge(s, scale);
        else
            largest.template exponentials<0>(s, scale);
        float sum[2] = {0.0f, 0.0f};
        add_rows(sum, s);
        inverse[0] = 1.0f / quad_sum(sum[0]), inverse[1] = 1.0f / quad_sum(sum[1]);
#pragma unroll
        for (int i = 0; i < SCORES; ++i) sums[i] = fmaf(s[i], inverse[i / 2 % 2], sums[i]);
    }

    // o = p v; the warp has then read v.
    __device__ inline void multiply_values(float (&o)[DIM / 2], int turn) {
        const auto place = Size::Values::place_of(turn);
        uint32_t p[STEPS][4];
        pack_rows<T>(p, s);
        const uint64_t v = line_descriptor(shared.values.at(place.stage), Size::TOKEN_PANEL);
        shared.values.wait_until_filled(place);
        hold(o);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            multiply_add_from_registers<T>(o, p[step], v + (step * 16 * LINE_BYTES >> 4), step > 0);
        wgmma_commit();
        wgmma_wait<0>(o);
        if (lane == 0) shared.values.release(place);
    }

    // Rows of this warp, when those of the head before have left.
    __device__ inline void store_rows(const WgmmaMaps& maps, const float (&o)[DIM / 2], const float (&inverse)[2],
                                      int head, int row0, int image) {
        constexpr int PANEL = ROWS_PER_STORE * LINE_BYTES;
        const int row = lane / 4;
        unsigned char* const lines = shared.out + warp * Size::PANELS * PANEL;
        if (lane == 0) store_wait();
        sync_warp();
#pragma unroll
        for (int i = 0; i < DIM / 8; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<uint32_t*>(lines + i / 8 * PANEL + (row + half * 8) * LINE_BYTES +
                                             (i % 8 ^ row) * 16 + lane % 4 * 4) =
                    pack<T>(o[4 * i + 2 * half] * inverse[half], o[4 * i + 2 * half + 1] * inverse[half]);
        stores_done();
        sync_warp();
        if (lane) return;
#pragma unroll
        for (int panel = 0; panel < Size::PANELS; ++panel)
            store_box(lines + panel * PANEL, maps.out, panel * LINE_CHANNELS, head, row0 + warp * ROWS_PER_STORE,
                      image);
        store_commit();
    }
};

template <typename T, int TOKENS, int DIM, int WARPGROUPS>
__global__ void __launch_bounds__(WgmmaTile<TOKENS, DIM, WARPGROUPS>::THREADS,
                                  WgmmaTile<TOKENS, DIM, WARPGROUPS>::BY_REGISTERS)
    one_block_kernel(const __grid_constant__ WgmmaMaps maps, const __grid_constant__ CudaCrossAttentionMaps p,
                     const __grid_constant__ WgmmaPlan plan) {
#if VPD_HOPPER
    using Size = WgmmaTile<TOKENS, DIM, WARPGROUPS>;
    // Known to be the same in a warp, else the compiler takes what follows for divergent and makes wgmma wait.
    const int group = same_in_warp(threadIdx.x / GROUP_THREADS), warp = same_in_warp(threadIdx.x / WARP_THREADS);
    const int lane = threadIdx.x % WARP_THREADS;
    const WgmmaShared<Size> shared(dynamic_shared());
    if (threadIdx.x == 0) {
        shared.queries.initialize(WARPGROUPS * WARPS_PER_GROUP);
        shared.values.initialize(WARPGROUPS * WARPS_PER_GROUP);
        barrier_init_done();
        prefetch_tensor_map(maps.q);
        prefetch_tensor_map(maps.k);
        prefetch_tensor_map(maps.v);
        prefetch_tensor_map(maps.out);
    }
    __syncthreads();
    const BlockTile block(p, plan, Size::ROWS);
    if (group == WARPGROUPS) {
        give_registers<Size::FEW>();
        if (threadIdx.x == Size::COMPUTING) copy_heads<Size>(maps, plan, shared, block);
        return;
    }
    take_registers<Size::MANY>();
    HeadsOfTile<T, TOKENS, DIM, WARPGROUPS> heads(shared, group, warp, lane);
#pragma unroll 1
    for (int head = block.head0; head < block.head_end; ++head) {
        float o[DIM / 2], inverse[2];
        heads.find_scores(head - block.head0);
        heads.find_probabilities(plan.scale_log2, int(p.tokens), inverse);
        heads.multiply_values(o, head - block.head0);
        heads.store_rows(maps, o, inverse, head, int(block.row0), int(block.image));
    }
    const auto sync = [] { sync_threads(1, Size::COMPUTING); };
    sync();  // the last values have been read
    float* const staged = reinterpret_cast<float*>(shared.queries.stages);
    constexpr int PITCH = sums_pitch(TOKENS);
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i)
        stage_sums(staged + warp * ROWS_PER_STORE * PITCH, PITCH, i, lane, heads.sums + 4 * i);
    write_head_sums(p, plan, block, staged, TOKENS, Size::COMPUTING, sync);
    if (lane == 0) store_wait();
#endif
}

}  // namespace vpd::attention_maps
