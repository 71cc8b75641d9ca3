// Kernel of self_attention with wgmma on sm_90a. One warpgroup starts copies by TMA; each of the others has 64 queries
// of a head, whose keys and values pass by in blocks.
//
// The copies walk through (channel, head, row, image), so a head's channels end with zeros where its neighbour's would
// follow, and rows beyond the last are zeros, too. Scores are the sums of wgmma; as probabilities, rounded in place, they
// are the left operand of the next: thread `lane` of a warp has of every 8 columns those at 2 * (lane % 4) and the next, of
// rows lane / 4 and 8 more. They are relative to the largest score so far, and what was added up before shrinks when
// that grows.
#pragma once

#include "cuda/ring.cuh"
#include "cuda/rounded_results.cuh"
#include "cuda/self_attention.h"
#include "cuda/softmax.cuh"
#include "cuda/wgmma_operands.cuh"

namespace vpd::attention {

using namespace device;

constexpr int WARP = 32, GROUP_THREADS = 128, GROUP_ROWS = 64;
static_assert(LINE_CHANNELS * 2 == LINE_BYTES);
constexpr int HEAD_DIMS[] = {40, 80,
                             160};  // for which kernels are compiled; a problem runs in the smallest that holds it
constexpr int MAX_GROUPS = 3;

struct Maps {
    TensorMap q, k, v;
};

struct Plan {
    int tiles;         // of queries per image and head
    int blocks;        // of keys
    bool shared;       // all images have the keys and values of the first
    float scale_log2;  // scale * log2(e), positive
};

// Sizes of a block of threads with GROUPS warpgroups that compute. A panel is 64 channels of all rows.
template <int DIM, int GROUPS>
struct Tile {
    static constexpr int KEYS = DIM <= 80 ? 128 : 64;  // at a time: more scores do not fit the registers
    static constexpr int ROWS = GROUPS * GROUP_ROWS, THREADS = (GROUPS + 1) * GROUP_THREADS;
    static constexpr int PANELS = (DIM + LINE_CHANNELS - 1) / LINE_CHANNELS, PARTS = (DIM + 15) / 16;
    static constexpr int QUERY_BYTES = PANELS * ROWS * LINE_BYTES, KEY_BYTES = PANELS * KEYS * LINE_BYTES;
    static constexpr int STAGES = DIM <= 40 ? 3 : 2;  // of keys, and as many of values
    static constexpr int SHARED_BYTES = SWIZZLE_ALIGNMENT + QUERY_BYTES + 2 * STAGES * KEY_BYTES + (4 * STAGES + 1) * 8;
    static_assert(SHARED_BYTES <= 227 * 1024);
};

// Of a thread, after the warpgroup that copies has given some away.
template <int GROUPS>
struct Registers {
    static constexpr int COPYING = GROUPS == 2 ? 24 : 32, COMPUTING = GROUPS == 2 ? 240 : 160;
    static_assert(COPYING + GROUPS * COMPUTING <= (64 << 10) / GROUP_THREADS || GROUPS == 1);
};

template <int DIM, int GROUPS>
struct Shared {
    using Size = Tile<DIM, GROUPS>;
    using Blocks = Ring<Size::STAGES, Size::KEY_BYTES>;  // of keys or of values
    unsigned char* queries;
    uint64_t* queries_filled;
    Blocks keys, values;
    __device__ explicit Shared(unsigned char* memory)
        : queries(memory + (-shared_address(memory) & (SWIZZLE_ALIGNMENT - 1))) {
        keys.stages = queries + Size::QUERY_BYTES, values.stages = keys.stages + Size::STAGES * Size::KEY_BYTES;
        keys.barriers = reinterpret_cast<uint64_t*>(values.stages + Size::STAGES * Size::KEY_BYTES);
        values.barriers = keys.barriers + Blocks::BARRIERS, queries_filled = values.barriers + Blocks::BARRIERS;
    }
};

// In which order blocks of keys and values are needed: k0 v0 k1 v1 ..., or k0 k1 v0 k2 v1 ... if they overlap.
template <int DIM, int GROUPS, bool OVERLAP>
__device__ inline void copy_blocks(const Maps& maps, const Plan& plan, const Shared<DIM, GROUPS>& shared, int tile,
                                   int head, int image) {
    using Size = Tile<DIM, GROUPS>;
    barrier_expect(shared.queries_filled, Size::QUERY_BYTES);
#pragma unroll
    for (int panel = 0; panel < Size::PANELS; ++panel)
        load_box(shared.queries + panel * Size::ROWS * LINE_BYTES, maps.q, shared.queries_filled, panel * LINE_CHANNELS,
                 head, tile * Size::ROWS, image);
    using Blocks = typename Shared<DIM, GROUPS>::Blocks;
    const auto copy = [&](const TensorMap& map, const Blocks& ring, typename Blocks::Stage& place, int block) {
        ring.begin_filling(place);
#pragma unroll
        for (int panel = 0; panel < Size::PANELS; ++panel)
            load_box(ring.at(place.stage) + panel * Size::KEYS * LINE_BYTES, map, ring.filled(place.stage),
                     panel * LINE_CHANNELS, head, block * Size::KEYS, plan.shared ? 0 : image);
        place = place.next();
    };
    typename Blocks::Stage key_place, value_place;
    if (OVERLAP) copy(maps.k, shared.keys, key_place, 0);
    for (int block = 0; block < plan.blocks; ++block) {
        if (!OVERLAP || block + 1 < plan.blocks) copy(maps.k, shared.keys, key_place, block + OVERLAP);
        copy(maps.v, shared.values, value_place, block);
    }
}

// Of rows lane / 4 and lane / 4 + 8: the largest score so far, and this thread's share of the sum of 2^(score - largest).
struct Softmax {
    Largest largest;
    float sum[2] = {0.0f, 0.0f};

    // Scores become exponentials; keep: what sums of earlier blocks are to be multiplied by.
    template <int POLYNOMIAL, int COUNT>
    __device__ inline void exponentials(float (&s)[COUNT], float scale, float (&keep)[2]) {
        const float before[2] = {largest.score[0], largest.score[1]};
        if (largest.include(s, scale)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) keep[half] = exp2_fast((before[half] - largest.score[half]) * scale);
            largest.exponentials_of_huge(s, scale);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                keep[half] = exp2_fast(multiply_rounded(before[half], scale) - largest.reference[half]);
            largest.exponentials<POLYNOMIAL>(s, scale);
        }
        sum[0] *= keep[0], sum[1] *= keep[1];
        add_rows(sum, s);
    }
};

template <typename T, int DIM, int GROUPS, int POLYNOMIAL>
struct Attention {
    using Size = Tile<DIM, GROUPS>;
    using Blocks = typename Shared<DIM, GROUPS>::Blocks;
    using Stage = typename Blocks::Stage;
    static constexpr int SCORES = Size::KEYS / 2, STEPS = Size::KEYS / 16;
    const Shared<DIM, GROUPS>& shared;
    const int group, lane;
    Stage place;  // of keys, and of values unless they are those of the block before
    Softmax softmax;
    float s[SCORES], o[DIM / 2];
    uint32_t p[STEPS][4];

    __device__ Attention(const Shared<DIM, GROUPS>& shared_, int group_, int lane_)
        : shared(shared_), group(group_), lane(lane_) {
#pragma unroll
        for (int i = 0; i < DIM / 2; ++i) o[i] = 0.0f;
    }

    // Both wait for the stage.
    __device__ inline void begin_scores(const Stage& at) {
        const uint64_t q = line_descriptor(shared.queries + group * GROUP_ROWS * LINE_BYTES);
        const uint64_t k = line_descriptor(shared.keys.at(at.stage));
        shared.keys.wait_until_filled(at);
        hold(s);
        wgmma_begin();
#pragma unroll
        for (int part = 0; part < Size::PARTS; ++part) {
            const int panel = part / 4, further = part % 4 * 32;
            multiply_add_wide<T>(s, q + ((panel * Size::ROWS * LINE_BYTES + further) >> 4),
                                 k + ((panel * Size::KEYS * LINE_BYTES + further) >> 4), part > 0);
        }
        wgmma_commit();
    }
    __device__ inline void begin_values(const Stage& at) {
        const uint64_t v = line_descriptor(shared.values.at(at.stage), Size::KEYS * LINE_BYTES);
        shared.values.wait_until_filled(at);
        hold(o);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            multiply_add_from_registers<T>(o, p[step], v + (step * 16 * LINE_BYTES >> 4), true);
        wgmma_commit();
    }

    // The warp has read the stage.
    __device__ inline void release(const Blocks& ring, const Stage& at) {
        if (lane == 0) ring.release(at);
    }

    __device__ inline void rescale(const float (&keep)[2]) {
        if (!any_in_warp(keep[0] != 1.0f || keep[1] != 1.0f)) return;  // as nearly always after the first blocks
#pragma unroll
        for (int i = 0; i < DIM / 2; ++i) o[i] *= keep[i / 2 % 2];
    }
    // valid: keys of the block, in the last one.
    template <bool LAST>
    __device__ inline void sequential(float scale, int valid) {
        float keep[2];
        begin_scores(place);
        wgmma_wait<0>(s);
        release(shared.keys, place);
        if (LAST) mask_columns<0>(s, valid, lane);
        softmax.template exponentials<POLYNOMIAL>(s, scale, keep);
        rescale(keep);
        pack_rows<T>(p, s);
        begin_values(place);
        wgmma_wait<0>(o);
        release(shared.values, place);
        place = place.next();
    }

    // The second product of a block beside the softmax of the next.
    template <bool LAST>
    __device__ inline void overlapped(float scale, int valid) {
        float keep[2];
        const Stage before = place;
        place = place.next();
        begin_scores(place);
        begin_values(before);
        wgmma_wait<1>(s);
        release(shared.keys, place);
        if (LAST) mask_columns<0>(s, valid, lane);
        softmax.template exponentials<POLYNOMIAL>(s, scale, keep);
        wgmma_wait<0>(o);
        release(shared.values, before);
        rescale(keep);
        pack_rows<T>(p, s);
    }
};

// Two neighbouring numbers of a row of a head, which begin at that place of out and of the factors.
template <typename T>
__device__ inline void store_two(const CudaSelfAttention& p, int64_t row, int head, int column, float low, float high) {
    if (!p.round_factors) {
        uint16_t* const to = static_cast<uint16_t*>(p.out.data) + row + column;
        return store_global(reinterpret_cast<uint32_t*>(to), pack<T>(low, high));
    }
    const float *const factors = p.round_factors + head + column, *const shifts = p.round_shifts + head + column;
    const uint32_t word = rounded_to_int8(low, load_global(factors), load_global(shifts)) |
                          rounded_to_int8(high, load_global(factors + 1), load_global(shifts + 1)) << 8;
    store_global(reinterpret_cast<uint16_t*>(static_cast<int8_t*>(p.out.data) + row + column), uint16_t(word));
}

template <typename T, int DIM, int GROUPS, bool OVERLAP, int POLYNOMIAL>
__global__ void __launch_bounds__(Tile<DIM, GROUPS>::THREADS, 1)
    attention_kernel(const __grid_constant__ Maps maps, const __grid_constant__ CudaSelfAttention problem,
                     const __grid_constant__ Plan plan) {
#if VPD_HOPPER
    using Size = Tile<DIM, GROUPS>;
    // Known to be the same in a warp, else the compiler takes what follows for divergent and makes wgmma wait.
    const int group = same_in_warp(threadIdx.x / GROUP_THREADS);
    const int warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
    const Shared<DIM, GROUPS> shared(dynamic_shared());
    if (threadIdx.x == 0) {
        shared.keys.initialize(GROUPS * GROUP_THREADS / WARP);
        shared.values.initialize(GROUPS * GROUP_THREADS / WARP);
        barrier_init(shared.queries_filled, 1);
        barrier_init_done();
        prefetch_tensor_map(maps.q);
        prefetch_tensor_map(maps.k);
        prefetch_tensor_map(maps.v);
    }
    __syncthreads();
    const int tile = blockIdx.x % plan.tiles, of_head = blockIdx.x / plan.tiles;
    const int head = of_head % int(problem.heads), image = of_head / int(problem.heads);
    if (group == GROUPS) {
        if constexpr (GROUPS > 1) give_registers<Registers<GROUPS>::COPYING>();
        if (threadIdx.x == GROUPS * GROUP_THREADS)
            copy_blocks<DIM, GROUPS, OVERLAP>(maps, plan, shared, tile, head, image);
        return;
    }
    if constexpr (GROUPS > 1) take_registers<Registers<GROUPS>::COMPUTING>();
    Attention<T, DIM, GROUPS, POLYNOMIAL> attention(shared, group, lane);
    const int last = plan.blocks - 1, valid = int(problem.keys) - last * Size::KEYS;
    barrier_wait(shared.queries_filled, 0);
    if constexpr (OVERLAP) {
        float keep[2];  // of nothing
        attention.begin_scores(attention.place);
        wgmma_wait<0>(attention.s);
        attention.release(shared.keys, attention.place);
        if (last == 0) mask_columns<0>(attention.s, valid, lane);
        attention.softmax.template exponentials<POLYNOMIAL>(attention.s, plan.scale_log2, keep);
        pack_rows<T>(attention.p, attention.s);
#pragma unroll 1
        for (int block = 1; block < last; ++block) attention.template overlapped<false>(plan.scale_log2, 0);
        if (last > 0) attention.template overlapped<true>(plan.scale_log2, valid);
        attention.begin_values(attention.place);
        wgmma_wait<0>(attention.o);
        attention.release(shared.values, attention.place);
    } else {
#pragma unroll 1
        for (int block = 0; block < last; ++block) attention.template sequential<false>(plan.scale_log2, 0);
        attention.template sequential<true>(plan.scale_log2, valid);
    }
    const int64_t first = image * problem.out.image + head * problem.head_dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float inverse = 1.0f / quad_sum(attention.softmax.sum[half]);
        const int64_t row = int64_t(tile) * Size::ROWS + group * GROUP_ROWS + warp * 16 + lane / 4 + half * 8;
        if (row >= problem.queries) continue;
#pragma unroll
        for (int i = 0; i < DIM / 8; ++i) {
            const int column = i * 8 + lane % 4 * 2;
            if (column < problem.head_dim)
                store_two<T>(problem, first + row * problem.out.row, head * int(problem.head_dim), column,
                             attention.o[4 * i + 2 * half] * inverse, attention.o[4 * i + 2 * half + 1] * inverse);
        }
    }
#endif
}

}  // namespace vpd::attention
