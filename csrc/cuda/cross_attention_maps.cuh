// Kernels of cross_attention_maps: a tile is 16 queries per warp, against all tokens.
//
// The probabilities of 16 queries stay in the registers of a warp, as accumulator fragments of q k^T: thread `lane` has of
// every 8 tokens those at 2 * (lane % 4) and the next, for queries lane / 4 and lane / 4 + 8. The map is accumulated over
// heads in the same fragments, and P v takes them, rounded, as its left operand, so P never leaves the registers.
#pragma once

#include "cuda/attention_maps_output.cuh"
#include "cuda/cross_attention_maps.h"
#include "cuda/quads.cuh"

namespace vpd::attention_maps {

using namespace device;

constexpr int WARP = 32, MAX_WARPS = 4, MAX_THREADS = MAX_WARPS * WARP, ROWS_PER_WARP = 16;

// Sizes that kernels are compiled for; a problem runs in the smallest that holds it.
constexpr int TOKEN_SIZES[] = {48, 80, 160, 256};
constexpr int DIM_SIZES[] = {48, 64, 80, 128, 160};

struct Plan : MapsPlan {
    int warps;
    bool one_buffer;   // v replaces k in shared memory, where there is no room for both
    float scale_log2;  // scale * log2(e)
};

// Of 16-bit elements in shared memory; rows start in different banks, because pitch / 8 is odd.
constexpr __host__ __device__ int pitch_of(int dim) { return dim + 8; }

// Where the sum over heads does not fit into registers beside the probabilities, it is in shared memory.
constexpr __host__ __device__ bool sums_in_registers(int tokens) { return tokens <= 160; }

// Offsets into shared memory, in bytes. Sums for the end of a block lie where k, v, q and out were.
struct SharedLayout {
    int v, q, out, sums, total;

    constexpr __host__ __device__ SharedLayout(int tokens, int dim, int warps, bool one_buffer)
        : v(one_buffer ? 0 : tokens * pitch_of(dim) * 2),
          q(v + tokens * pitch_of(dim) * 2),
          out(q + warps * ROWS_PER_WARP * pitch_of(dim) * 2),
          sums(0),
          total(0) {
        const int tiles_end = out + warps * ROWS_PER_WARP * pitch_of(dim) * 2;
        const int staged_end = warps * ROWS_PER_WARP * sums_pitch(tokens) * 4;
        sums = ((tiles_end > staged_end ? tiles_end : staged_end) + 15) / 16 * 16;
        total = sums + (sums_in_registers(tokens) ? 0 : warps * ROWS_PER_WARP * tokens * 4);
    }
};

// Copies `rows` rows of DIM elements into shared memory; zeros beyond valid_rows and valid_dim.
template <int DIM>
__device__ inline void copy_rows(uint16_t* shared, const uint16_t* global, uint32_t stride, unsigned rows,
                                 unsigned valid_rows, unsigned valid_dim) {
    constexpr unsigned CHUNKS = DIM / 8;
    for (unsigned i = threadIdx.x; i < rows * CHUNKS; i += blockDim.x) {
        const unsigned row = i / CHUNKS, column = i % CHUNKS * 8;
        async_copy_16(shared + row * pitch_of(DIM) + column, global + (uint64_t(row) * stride + column),
                      row < valid_rows && column < valid_dim);
    }
}

// s = q k^T for the 16 queries of a warp.
template <typename T, int TOKENS, int DIM>
__device__ inline void queries_times_keys(float (&s)[TOKENS / 8][4], const uint16_t* q, const uint16_t* k, int lane) {
    constexpr int PITCH = pitch_of(DIM);
    q += lane % 16 * PITCH + lane / 16 * 8;
    k += (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int tile = 0; tile < TOKENS / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[tile][i] = 0.0f;
#pragma unroll(TOKENS <= 80 ? 2 : 1)
    for (int step = 0; step < DIM / 16; ++step) {
        uint32_t a[4];
        load_matrices(a, q + step * 16);
#pragma unroll
        for (int pair = 0; pair < TOKENS / 16; ++pair) {
            uint32_t b[4];
            load_matrices(b, k + pair * 16 * PITCH + step * 16);
            multiply_add<T>(s[2 * pair], a, b[0], b[1]);
            multiply_add<T>(s[2 * pair + 1], a, b[2], b[3]);
        }
    }
}

// The largest number of tokens that a smaller kernel takes.
constexpr __host__ __device__ int tokens_below(int padded) {
    int below = 0;
    for (int tokens : TOKEN_SIZES) below = tokens < padded ? tokens : below;
    return below;
}

// s becomes 2^(s * scale_log2 - largest of the row), 0 for padding; returns 1 / sums of rows lane / 4 and lane / 4 + 8.
template <int TOKENS>
__device__ inline void exponentials(float (&s)[TOKENS / 8][4], float scale_log2, int tokens, int lane,
                                    float (&inverse)[2]) {
    constexpr int NEVER_PADDING = tokens_below(TOKENS);
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int tile = 0; tile < TOKENS / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float x = s[tile][i] * scale_log2;
            if (tile * 8 + 8 > NEVER_PADDING && tile * 8 + lane % 4 * 2 + i % 2 >= tokens) x = -INFINITY;
            s[tile][i] = x;
            largest[i / 2] = fmaxf(largest[i / 2], x);
        }
    largest[0] = quad_max(largest[0]), largest[1] = quad_max(largest[1]);
#pragma unroll
    for (int tile = 0; tile < TOKENS / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[tile][i] = exp2_fast(s[tile][i] - largest[i / 2]);
            sum[i / 2] += s[tile][i];
        }
    inverse[0] = 1.0f / quad_sum(sum[0]), inverse[1] = 1.0f / quad_sum(sum[1]);
}

// Rows of out, 16-bit, in shared memory: p v / sum for the 16 queries of a warp.
template <typename T, int TOKENS, int DIM>
__device__ inline void probabilities_times_values(const uint32_t (&p)[TOKENS / 16][4], const uint16_t* v,
                                                  const float (&inverse)[2], uint16_t* out, int lane) {
    constexpr int PITCH = pitch_of(DIM);
    // Columns are computed in passes over the tokens, of as many pairs of 8 columns as registers allow.
    constexpr int ALL = DIM / 16, MAX_PAIRS = TOKENS <= 160 ? 5 : 4, PASSES = (ALL + MAX_PAIRS - 1) / MAX_PAIRS;
    constexpr int PAIRS = (ALL + PASSES - 1) / PASSES;
    v += lane % 16 * PITCH + lane / 16 * 8;
    out += lane / 4 * PITCH + lane % 4 * 2;
#pragma unroll
    for (int first = 0; first < ALL; first += PAIRS) {
        float o[2 * PAIRS][4] = {};
#pragma unroll
        for (int step = 0; step < TOKENS / 16; ++step)
#pragma unroll
            for (int pair = 0; pair < PAIRS && first + pair < ALL; ++pair) {
                uint32_t b[4];
                load_matrices_transposed(b, v + step * 16 * PITCH + (first + pair) * 16);
                multiply_add<T>(o[2 * pair], p[step], b[0], b[1]);
                multiply_add<T>(o[2 * pair + 1], p[step], b[2], b[3]);
            }
#pragma unroll
        for (int tile = 0; tile < 2 * PAIRS && first * 2 + tile < 2 * ALL; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<uint32_t*>(out + half * 8 * PITCH + first * 16 + tile * 8) =
                    pack<T>(o[tile][2 * half] * inverse[half], o[tile][2 * half + 1] * inverse[half]);
    }
}

// Blocks per multiprocessor that leave enough registers for fragments of this many tokens.
constexpr int resident_blocks(int tokens) { return tokens <= 80 ? 3 : 2; }

template <typename T, int TOKENS, int DIM>
__global__ void __launch_bounds__(MAX_THREADS, resident_blocks(TOKENS))
    forward_kernel(const CudaCrossAttentionMaps p, const Plan plan) {
    constexpr int TILES = TOKENS / 8, PITCH = pitch_of(DIM);
    constexpr bool IN_REGISTERS = sums_in_registers(TOKENS);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const BlockTile block(p, plan, plan.warps * ROWS_PER_WARP);
    const int64_t image = block.image, row0 = block.row0;
    const int rows = block.rows, valid_rows = block.valid_rows, head0 = block.head0, head_end = block.head_end;
    const int tokens = int(p.tokens), dim = int(p.head_dim);

    unsigned char* const shared = dynamic_shared();
    const SharedLayout layout(TOKENS, DIM, plan.warps, plan.one_buffer);
    uint16_t* const k_tile = reinterpret_cast<uint16_t*>(shared);
    uint16_t* const v_tile = reinterpret_cast<uint16_t*>(shared + layout.v);
    uint16_t* const q_tile = reinterpret_cast<uint16_t*>(shared + layout.q);
    uint16_t* const out_rows = reinterpret_cast<uint16_t*>(shared + layout.out) + warp * ROWS_PER_WARP * PITCH;

    const uint16_t* const q = static_cast<const uint16_t*>(p.q) + image * p.q_image + row0 * p.q_row;
    const uint16_t* const k = static_cast<const uint16_t*>(p.k) + image * p.k_image;
    const uint16_t* const v = static_cast<const uint16_t*>(p.v) + image * p.v_image;
    const auto copy_q_and_k = [&](int head) {
        if (head < head_end) {
            copy_rows<DIM>(q_tile, q + int64_t(head) * dim, uint32_t(p.q_row), rows, valid_rows, dim);
            copy_rows<DIM>(k_tile, k + int64_t(head) * dim, uint32_t(p.k_row), TOKENS, tokens, dim);
        }
        async_commit();
    };
    const auto copy_v = [&](int head) {
        if (head < head_end) copy_rows<DIM>(v_tile, v + int64_t(head) * dim, uint32_t(p.v_row), TOKENS, tokens, dim);
        async_commit();
    };
    // The copy that was started last may still run, unless it is the one that is needed next.
    const auto wait_and_sync = [&] {
        if (plan.one_buffer)
            async_wait<0>();
        else
            async_wait<1>();
        __syncthreads();
    };

    // Of each thread; in shared memory 16 bytes per tile of 8 tokens, interleaved over the threads of a warp.
    float sums[IN_REGISTERS ? TILES : 1][4];
    float4* const shared_sums = reinterpret_cast<float4*>(shared + layout.sums) + warp * TILES * WARP + lane;
    if constexpr (IN_REGISTERS) {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][i] = 0.0f;
    } else {
        for (int t = 0; t < TILES; ++t) shared_sums[t * WARP] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }

    copy_q_and_k(head0);
    if (!plan.one_buffer) copy_v(head0);
    for (int head = head0; head < head_end; ++head) {
        float s[TILES][4], inverse[2];
        wait_and_sync();
        queries_times_keys<T, TOKENS, DIM>(s, q_tile + warp * ROWS_PER_WARP * PITCH, k_tile, lane);
        __syncthreads();
        if (plan.one_buffer)
            copy_v(head);
        else
            copy_q_and_k(head + 1);
        exponentials<TOKENS>(s, plan.scale_log2, tokens, lane, inverse);
        if (plan.head_sum != HeadSum::nothing) {
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if constexpr (IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[t][i] = fmaf(s[t][i], inverse[i / 2], sums[t][i]);
                } else {
                    float4 sum = shared_sums[t * WARP];
                    sum.x = fmaf(s[t][0], inverse[0], sum.x), sum.y = fmaf(s[t][1], inverse[0], sum.y);
                    sum.z = fmaf(s[t][2], inverse[1], sum.z), sum.w = fmaf(s[t][3], inverse[1], sum.w);
                    shared_sums[t * WARP] = sum;
                }
            }
        }
        uint32_t rounded[TOKENS / 16][4];
#pragma unroll
        for (int step = 0; step < TOKENS / 16; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                rounded[step][i] = pack<T>(s[2 * step + i / 2][i % 2 * 2], s[2 * step + i / 2][i % 2 * 2 + 1]);
        wait_and_sync();
        probabilities_times_values<T, TOKENS, DIM>(rounded, v_tile, inverse, out_rows, lane);
        __syncthreads();
        if (plan.one_buffer)
            copy_q_and_k(head + 1);
        else
            copy_v(head + 1);
        uint16_t* const out = static_cast<uint16_t*>(p.out) + ((image * p.queries + row0) * p.heads + head) * dim;
#pragma unroll 1  // else the compiler keeps every row and column in a register through the loop over heads
        for (int i = lane; i < ROWS_PER_WARP * (DIM / 8); i += WARP) {
            const int row = i / (DIM / 8), column = i % (DIM / 8) * 8;
            if (warp * ROWS_PER_WARP + row < valid_rows && column < dim)
                store_global(reinterpret_cast<uint4*>(out + (warp * ROWS_PER_WARP + row) * p.heads * dim + column),
                             *reinterpret_cast<const uint4*>(out_rows + row * PITCH + column));
        }
    }
    if (plan.head_sum == HeadSum::nothing) return;

    float* const staged = reinterpret_cast<float*>(shared);
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        if constexpr (!IN_REGISTERS) {
            const float4 sum = shared_sums[t * WARP];
            sums[0][0] = sum.x, sums[0][1] = sum.y, sums[0][2] = sum.z, sums[0][3] = sum.w;
        }
        stage_sums(staged + warp * ROWS_PER_WARP * sums_pitch(TOKENS), sums_pitch(TOKENS), t, lane,
                   sums[IN_REGISTERS ? t : 0]);
    }
    write_head_sums(p, plan, block, staged, TOKENS, blockDim.x, [] { __syncthreads(); });
}

constexpr int ROWS_PER_ADD = 8;

// Adds up the partial sums that the groups of a tile wrote, and writes the maps of ROWS_PER_ADD of its rows.
__global__ void __launch_bounds__(MAX_THREADS) add_partial_kernel(const CudaCrossAttentionMaps p, const Plan plan) {
    const int rows = plan.warps * ROWS_PER_WARP, parts = rows / ROWS_PER_ADD, tokens = int(p.tokens);
    const int64_t tile = blockIdx.x / parts, image = tile / plan.tiles_per_image;
    const int first = blockIdx.x % parts * ROWS_PER_ADD;
    const int64_t row0 = tile % plan.tiles_per_image * rows + first;
    const int valid_rows = p.queries - row0 < ROWS_PER_ADD ? int(p.queries - row0) : ROWS_PER_ADD;
    float* const staged = reinterpret_cast<float*>(dynamic_shared());
    const float* const partial = static_cast<const float*>(p.scratch) + (tile * plan.groups * rows + first) * tokens;
    for (int i = threadIdx.x; i < valid_rows * tokens; i += blockDim.x) {
        float total = 0.0f;
#pragma unroll 8
        for (int group = 0; group < plan.groups; ++group)
            total += load_global(partial + int64_t(group) * rows * tokens + i);
        staged[i] = total;
    }
    __syncthreads();
    write_maps(p, plan, staged, tokens, image, 0, row0, valid_rows, blockDim.x);
}

}  // namespace vpd::attention_maps
