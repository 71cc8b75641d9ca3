// GEMM with wgmma whose blocks stay: one per multiprocessor, each with tiles one after the other, in clusters of two.
//
// The blocks of a cluster have neighbouring tiles of rows and the same columns. Each loads its own rows and half of the
// weight's, which TMA sends to both. One thread of the first warpgroup starts all copies, and is ahead of the others by the
// ring of stages, also into the next tile; two warpgroups multiply 64 or 128 rows each by 128 to 256 columns, with the
// registers that the first gives back.
//
// A stage is filled when a block's rows and both halves of the weight have come, and emptied when both warpgroups of both
// blocks are done with it, since either block's half is sent to both.
//
// Epilogue: sums become the result in registers, which goes through shared memory, where the residual was loaded by TMA,
// and is stored by TMA, which leaves out what is beyond the result. Bits are those of the other kernels. Results and
// residuals are bfloat16.
//
// Statistics of the result are found by the three idle warps of the first warpgroup, from the results in shared memory,
// while the next tile is multiplied: a thread has two columns and all positions of a run. The memory is written again when
// they say that they have read it.
#pragma once

#include "cuda/gemm_statistics.cuh"
#include "cuda/gemm_wgmma.cuh"

namespace vpd::gemm {

struct PersistentMaps {
    TensorMaps operands;
    TensorMap out, residual;
};

constexpr int CLUSTER = 2;
constexpr uint16_t ALL_BLOCKS = (1 << CLUSTER) - 1;

// Columns of a box that one warpgroup stores at a time.
constexpr int stored_columns(int columns) { return columns % 64 ? 32 : 64; }

template <int ROWS_, int COLUMNS>
struct PersistentTile {
    static constexpr int ROWS = ROWS_, WARPGROUP = 128, GROUPS = 2, THREADS = (GROUPS + 1) * WARPGROUP;
    static constexpr int SUBTILES = ROWS / (GROUPS * STORED_ROWS);  // of a warpgroup
    static constexpr int LEFT_BYTES = ROWS * STEP_BYTES, STAGE_BYTES = LEFT_BYTES + COLUMNS * STEP_BYTES;
    static constexpr int STAGES = 3;
    // Where a warpgroup's results lie before they are stored: those of all its subtiles, or of one after the other.
    static constexpr int STORED = stored_columns(COLUMNS), STORED_LINE = STORED * 2;
    static constexpr int SUBTILE_BYTES = STORED_ROWS * COLUMNS * 2, BUFFERS = COLUMNS == 160 ? 1 : SUBTILES;
    static constexpr int STAGED_BYTES = GROUPS * BUFFERS * SUBTILE_BYTES;
    // Warps that find statistics, and columns that they read as words.
    static constexpr int WATCHERS = 3, WORDS = COLUMNS / 2,
                         WORDS_EACH = (WORDS + WATCHERS * WARP - 1) / (WATCHERS * WARP);
    static_assert(WORDS_EACH == 1 || BUFFERS == SUBTILES);  // else a subtile is gone before it is read again
    // Of stages that are filled and emptied, of residuals, and of buffers that are filled and read.
    static constexpr int BARRIERS = 2 * STAGES + GROUPS + 2 * GROUPS * BUFFERS;
    static constexpr int ALIGNMENT = 1024;
    static constexpr int SHARED_BYTES = ALIGNMENT + STAGES * STAGE_BYTES + STAGED_BYTES +
                                        (BARRIERS * 8 + 15) / 16 * 16 + GROUPS * int(sizeof(TileColumns<COLUMNS>));
    static_assert(SHARED_BYTES <= 227 * 1024 && COLUMNS / CLUSTER * STEP_BYTES % ALIGNMENT == 0);
    // Registers of a thread that copies, and of one that multiplies; 168 are there for each at first.
    static constexpr int FEW = 40, MANY = 232;
    static_assert(FEW + GROUPS * MANY <= (GROUPS + 1) * 168);
};

// What a thread that multiplies keeps of a row: its scale and zero, if there are any.
struct RowScale {
    float scale;
    int32_t zero;
};

template <typename Size, int BYTES>
__device__ inline void copy_tiles(const PersistentMaps& maps, const CudaGemm& p, const Plan& plan,
                                  unsigned char* stages, uint64_t* filled, int rank) {
    constexpr int COLUMNS = (Size::STAGE_BYTES - Size::LEFT_BYTES) / STEP_BYTES, SHARE = COLUMNS / CLUSTER;
    uint64_t* full = filled;
    unsigned char* to = stages;
    int stages_left = Size::STAGES;
    unsigned parity = 1;  // of the phase before the first, which counts as ended
    for (int index = blockIdx.x; index < plan.row_tiles * plan.column_tiles; index += gridDim.x) {
        const Tile tile = tile_of(plan, index);
        const int y = tile.y * int(p.stride) - int(p.top), x = tile.x * int(p.stride) - int(p.left);
        const int share = tile.column + rank * SHARE;
        Step<BYTES> step(p, plan, 0);
        for (int left = plan.steps; left > 0; step.next_tap(p)) {
            int blocks = plan.blocks[step.source];
            left -= blocks;
            const TensorMap& source = maps.operands.source[step.source];
            const int from_x = x + step.dx, from_y = y + step.dy;
            int channel = 0, column = step.weight_column(p);
            for (; blocks > 0; --blocks) {
                barrier_wait(full + Size::STAGES, parity);
                barrier_expect(full, Size::STAGE_BYTES);
                load_box(to, source, full, channel, from_x, from_y, tile.image);
                load_box_to_all(to + Size::LEFT_BYTES + rank * SHARE * STEP_BYTES, maps.operands.weight, full, column,
                                share, ALL_BLOCKS);
                channel += STEP_BYTES / BYTES, column += STEP_BYTES / BYTES;
                ++full, to += Size::STAGE_BYTES;
                if (--stages_left == 0) stages_left = Size::STAGES, full = filled, to = stages, parity ^= 1;
            }
        }
    }
}

// Where a warpgroup is in the ring of stages.
struct RingPlace {
    int stage = 0;
    unsigned parity = 0;
};

// Sums of the subtiles of the warpgroup `group`. meanwhile() is called once, with products under way.
template <typename T, typename Size, int COLUMNS, typename Meanwhile>
__device__ inline void multiply_tile(typename Operand<T>::Sum (&sums)[Size::SUBTILES][COLUMNS / 2], const CudaGemm& p,
                                     const Plan& plan, const unsigned char* stages, uint64_t* filled, uint64_t* emptied,
                                     RingPlace& place, int group, int lane, Meanwhile meanwhile) {
    Step<Operand<T>::BYTES> step(p, plan, 0);
#pragma unroll
    for (int i = 0; i < Size::SUBTILES; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS / 2; ++j) sums[i][j] = 0;
    // A step after which products of two are under way, or of the only one; late where results are still being read.
    const int begun = plan.statistics && plan.steps > 4 ? plan.steps - 3 : plan.steps > 1;
    int done = -1;  // the stage whose products may still be under way
    const auto release = [&] {
        if (lane < CLUSTER && done >= 0) barrier_arrive_at(emptied + done, lane);
    };
    for (int i = 0; i < plan.steps; ++i) {
        const unsigned char* const left = stages + place.stage * Size::STAGE_BYTES;
        const uint64_t a = descriptor(left + group * Size::SUBTILES * STORED_ROWS * STEP_BYTES);
        const uint64_t b = descriptor(left + Size::LEFT_BYTES);
        const int parts = step.parts(p);
        step.advance(p, plan);
        barrier_wait(filled + place.stage, place.parity);
        wgmma_begin();
        const auto multiply = [&](int part) {
            const int further = part * (PART_BYTES >> 4);
#pragma unroll
            for (int j = 0; j < Size::SUBTILES; ++j)
                multiply_add_wide<T>(sums[j], a + further + j * (STORED_ROWS * STEP_BYTES >> 4), b + further, true);
        };
        if (parts == STEP_BYTES / PART_BYTES) {
#pragma unroll
            for (int part = 0; part < STEP_BYTES / PART_BYTES; ++part) multiply(part);
            wgmma_commit();
        } else {
#pragma unroll 1
            for (int part = 0; part < parts; ++part) multiply(part);
            wgmma_commit();
        }
        if (i == begun) meanwhile();
        wgmma_wait<1>(sums);
        release();
        done = place.stage;
        if (++place.stage == Size::STAGES) place.stage = 0, place.parity ^= 1;
    }
    wgmma_wait<0>(sums);
    release();
}

// Two neighbouring columns of a result from their sums.
template <typename T, int COLUMNS>
__device__ inline void scaled_pair(const RowScale& row, const TileColumns<COLUMNS>& columns, int column,
                                   const typename Operand<T>::Sum* sums, float (&x)[2]) {
    using Sum = typename Operand<T>::Sum;
    const Two<float> bias = *reinterpret_cast<const Two<float>*>(columns.bias + column);
    Two<float> scale{};
    Two<int32_t> weight_sums{};
    if constexpr (Operand<T>::BYTES == 1) scale = *reinterpret_cast<const Two<float>*>(columns.scale + column);
    if constexpr (std::is_same_v<T, int8_t>)
        weight_sums = *reinterpret_cast<const Two<int32_t>*>(columns.weight_sums + column);
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = scaled_sum<T>(row, sums[i], scale.v[i], bias.v[i], weight_sums.v[i]);
}

// Puts the result of 64 rows into shared memory, as boxes of STORED columns, swizzled as TMA stores them; with what is
// there, the residual, if there is one. rows: of this thread, lane / 4 of its warp and 8 further.
template <typename T, typename Size, int COLUMNS, bool GEGLU>
__device__ inline void stage_result(const CudaGemm& p, const typename Operand<T>::Sum (&sums)[COLUMNS / 2],
                                    const RowScale (&rows)[2], const TileColumns<COLUMNS>& columns,
                                    unsigned char* staged, int warp, int lane) {
    constexpr int PIECES = Size::STORED / 8;  // of 16 bytes in a line
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int line = warp % 4 * ROWS_PER_WARP + lane / 4 + half * 8;
        const int swizzle = PIECES == 8 ? line & 7 : line >> 1 & 3;
        unsigned char* const at = staged + line * Size::STORED_LINE + lane % 4 * 4;
#pragma unroll
        for (int j = 0; j < COLUMNS / (GEGLU ? 16 : 8); ++j) {  // eight columns of the result
            const int group = GEGLU ? j / 2 * 4 + j % 2 : j, column = group * 8 + lane % 4 * 2;
            float x[2];
            scaled_pair<T>(rows[half], columns, column, sums + group * 4 + half * 2, x);
            if constexpr (GEGLU) {  // gates are 16 columns further
                float gate[2];
                scaled_pair<T>(rows[half], columns, column + 16, sums + (group + 2) * 4 + half * 2, gate);
                x[0] *= gelu(gate[0]), x[1] *= gelu(gate[1]);
            } else if (p.activation == CudaActivation::relu) {
                x[0] = activated(CudaActivation::relu, x[0]), x[1] = activated(CudaActivation::relu, x[1]);
            }
            uint32_t* const word = reinterpret_cast<uint32_t*>(at + j / PIECES * STORED_ROWS * Size::STORED_LINE +
                                                               (j % PIECES ^ swizzle) * 16);
            if (!GEGLU && p.residual.data) {
                float low, high;
                unpack<Bfloat16>(*word, low, high);
                x[0] += low, x[1] += high;
            }
            *word = pack<Bfloat16>(x[0], x[1]);
        }
    }
}

// Statistics of all tiles of the block, by one of the warps that have nothing else to do. Behind the barriers of buffers
// that are filled, one per group and buffer, lie those of buffers that have been read.
template <typename Size>
__device__ inline void watch_tiles(const CudaGemm& p, const Plan& plan, const unsigned char* staged,
                                   uint64_t* staged_full, int warp, int lane) {
    constexpr int SUBTILES = Size::GROUPS * Size::SUBTILES, PIECES = Size::STORED / 8;
    constexpr int USES = Size::SUBTILES / Size::BUFFERS;  // of a buffer in a tile
    const int run = 1 << plan.log_run, together = run < STORED_ROWS ? run : STORED_ROWS;
    int uses = 0;
    for (int index = blockIdx.x; index < plan.row_tiles * plan.column_tiles; index += gridDim.x, uses += USES) {
        const int first = tile_of(plan, index).column;
#pragma unroll 1
        for (int turn = 0; turn < Size::WORDS_EACH; ++turn) {
            const int word = (turn * Size::WATCHERS + warp) * WARP + lane, column = first + word * 2;
            const bool exists = word < Size::WORDS && column < p.n;
            const unsigned char* const from =
                staged + word * 4 / Size::STORED_LINE * STORED_ROWS * Size::STORED_LINE + word % 4 * 4;
            const int piece = word / 4 % PIECES;
            RunningStatistics<2> statistics;
#pragma unroll 1
            for (int subtile = 0; subtile < SUBTILES; ++subtile) {
                const int group = subtile / Size::SUBTILES, of_group = subtile - group * Size::SUBTILES;
                const int buffer = group * Size::BUFFERS + of_group % Size::BUFFERS;
                if (turn == 0) barrier_wait(staged_full + buffer, uses + of_group / Size::BUFFERS & 1);
                const unsigned char* const lines = from + buffer * Size::SUBTILE_BYTES;
                const auto numbers = [&](int line, float (&x)[2]) {
                    const int swizzle = PIECES == 8 ? line & 7 : line >> 1 & 3;
                    unpack<Bfloat16>(
                        *reinterpret_cast<const uint32_t*>(lines + line * Size::STORED_LINE + (piece ^ swizzle) * 16),
                        x[0], x[1]);
                };
#pragma unroll 1
                for (int begin = 0; exists && begin < STORED_ROWS; begin += together) {
                    const int place = subtile * STORED_ROWS + begin;
                    float x[2];
                    if ((place & (run - 1)) == 0) numbers(begin, x), statistics.begin(x);
#pragma unroll 1
                    for (int four = begin / 4; four < (begin + together) / 4; ++four)
#pragma unroll
                        for (int i = 0; i < 4; ++i) numbers(four * 4 + i, x), statistics.add(x);
                    if ((place + together) & (run - 1)) continue;
                    // Found again, as there are few registers.
                    const Position at = position_of(plan, tile_of(plan, index), place + together - run);
                    if (inside(p, at)) statistics.store(place_of_run(p, plan, at, column), p.n, 1.0f / float(run));
                }
                if (turn == Size::WORDS_EACH - 1) {
                    sync_warp();
                    if (lane == 0) barrier_arrive(staged_full + Size::GROUPS * Size::BUFFERS + buffer);
                }
            }
        }
    }
}

template <typename T, typename Size, int COLUMNS>
__device__ inline void multiply_tiles(const PersistentMaps& maps, const CudaGemm& p, const Plan& plan,
                                      unsigned char* stages, unsigned char* staged, uint64_t* filled, uint64_t* loaded,
                                      uint64_t* staged_full, TileColumns<COLUMNS>& columns, int group, int warp,
                                      int lane) {
    const int thread = threadIdx.x % Size::WARPGROUP;
    const bool geglu = p.activation == CudaActivation::geglu, leader = thread == 0;
    const int width = COLUMNS / (geglu ? 2 : 1);  // of the result
    RingPlace place;
    unsigned loads = 0;  // of residuals, so far
    unsigned uses = 0;   // of each buffer of results, so far
    // The leader waits until a buffer's results have left and been read.
    const auto wait_for_buffer = [&](int buffer) {
        store_wait();
        if (plan.statistics && uses) barrier_wait(staged_full + (Size::GROUPS * Size::BUFFERS + buffer), uses - 1 & 1);
    };
    typename Operand<T>::Sum sums[Size::SUBTILES][COLUMNS / 2];
    for (int index = blockIdx.x; index < plan.row_tiles * plan.column_tiles; index += gridDim.x) {
        const Tile tile = tile_of(plan, index);
        const int result_column = geglu ? tile.column / 2 : tile.column;
        const auto place_of = [&](int subtile) {
            return position_of(plan, tile, (group * Size::SUBTILES + subtile) * STORED_ROWS);
        };
        const auto load_residual = [&](int subtile) {
            const Position at = place_of(subtile);
            unsigned char* const to = staged + subtile % Size::BUFFERS * Size::SUBTILE_BYTES;
            for (int i = 0; i < width / Size::STORED; ++i)
                load_box(to + i * STORED_ROWS * Size::STORED_LINE, maps.residual, loaded,
                         result_column + i * Size::STORED, at.x, at.y, at.image);
        };
        RowScale rows[Size::SUBTILES][2] = {};
        const auto prepare_epilogue = [&] {
            if (leader) {  // the results of the tile before have to leave first
                for (int i = 0; i < Size::BUFFERS; ++i) wait_for_buffer(i);
                if (p.residual.data) {
                    barrier_expect(loaded, Size::BUFFERS * Size::SUBTILE_BYTES);
                    for (int i = 0; i < Size::BUFFERS; ++i) load_residual(i);
                }
            }
            load_columns<T>(p, tile, columns, thread, Size::WARPGROUP);
            if constexpr (Operand<T>::BYTES == 1) {
#pragma unroll
                for (int i = 0; i < Size::SUBTILES * 2; ++i) {
                    const int row =
                        (group * Size::SUBTILES + i / 2) * STORED_ROWS + warp % 4 * ROWS_PER_WARP + lane / 4;
                    const ResultRow full = row_of<T>(p, position_of(plan, tile, row + i % 2 * 8));
                    rows[i / 2][i % 2] = {full.scale, full.zero};
                }
            }
        };
        multiply_tile<T, Size, COLUMNS>(sums, p, plan, stages, filled, filled + Size::STAGES, place, group, lane,
                                        prepare_epilogue);
        sync_threads(1 + group, Size::WARPGROUP);
#pragma unroll
        for (int i = 0; i < Size::SUBTILES; ++i) {
            unsigned char* const buffer = staged + i % Size::BUFFERS * Size::SUBTILE_BYTES;
            if (i >= Size::BUFFERS) {  // the subtile before has to leave first
                if (leader) {
                    wait_for_buffer(0);
                    if (p.residual.data) barrier_expect(loaded, Size::SUBTILE_BYTES), load_residual(i);
                }
                sync_threads(1 + group, Size::WARPGROUP);
            }
            if (p.residual.data && (i == 0 || i >= Size::BUFFERS)) barrier_wait(loaded, loads++ & 1);
            if (geglu)
                stage_result<T, Size, COLUMNS, true>(p, sums[i], rows[i], columns, buffer, warp, lane);
            else
                stage_result<T, Size, COLUMNS, false>(p, sums[i], rows[i], columns, buffer, warp, lane);
            stores_done();
            sync_threads(1 + group, Size::WARPGROUP);
            if (leader) {
                const Position at = place_of(i);
                for (int j = 0; j < width / Size::STORED; ++j)
                    store_box(buffer + j * STORED_ROWS * Size::STORED_LINE, maps.out, result_column + j * Size::STORED,
                              at.x, at.y, at.image);
                store_commit();
                if (plan.statistics) barrier_arrive(staged_full + i % Size::BUFFERS);
            }
            if ((i + 1) % Size::BUFFERS == 0) ++uses;
        }
    }
    if (leader) store_wait();
}

template <typename T, int ROWS, int COLUMNS>
__global__ void __launch_bounds__(PersistentTile<ROWS, COLUMNS>::THREADS, 1)
    persistent_kernel(const __grid_constant__ PersistentMaps maps, const __grid_constant__ CudaGemm p,
                      const __grid_constant__ Plan plan) {
#if VPD_HOPPER
    using Size = PersistentTile<ROWS, COLUMNS>;
    const int warpgroup = same_in_warp(threadIdx.x / Size::WARPGROUP);
    const int warp = same_in_warp(threadIdx.x / WARP), lane = threadIdx.x % WARP;
    unsigned char* const memory = dynamic_shared();
    unsigned char* const stages = memory + (-shared_address(memory) & (Size::ALIGNMENT - 1));
    unsigned char* const staged = stages + Size::STAGES * Size::STAGE_BYTES;
    uint64_t* const filled = reinterpret_cast<uint64_t*>(staged + Size::STAGED_BYTES);
    uint64_t* const loaded = filled + 2 * Size::STAGES;   // behind the barriers of emptied stages
    uint64_t* const staged_full = loaded + Size::GROUPS;  // then of those that have been read
    if (threadIdx.x == 0) {
        for (int i = 0; i < Size::STAGES; ++i) {
            barrier_init(filled + i, 1);
            barrier_init(filled + Size::STAGES + i, CLUSTER * Size::GROUPS * Size::WARPGROUP / WARP);
        }
        for (int i = 0; i < Size::GROUPS; ++i) barrier_init(loaded + i, 1);
        for (int i = 0; i < Size::GROUPS * Size::BUFFERS; ++i) {
            barrier_init(staged_full + i, 1);
            barrier_init(staged_full + Size::GROUPS * Size::BUFFERS + i, Size::WATCHERS);
        }
        barrier_init_done();
        prefetch_tensor_map(maps.operands.source[0]);
        prefetch_tensor_map(maps.operands.weight);
        prefetch_tensor_map(maps.out);
    }
    __syncthreads();
    cluster_arrive(), cluster_wait();  // nothing is sent to a block before its barriers are there
    if (warpgroup == 0) {
        give_registers<Size::FEW>();
        if (warp > 0) {
            if (plan.statistics) watch_tiles<Size>(p, plan, staged, staged_full, warp - 1, lane);
        } else if (elected()) {
            copy_tiles<Size, Operand<T>::BYTES>(maps, p, plan, stages, filled, int(rank_in_cluster()));
        }
    } else {
        take_registers<Size::MANY>();
        const int group = warpgroup - 1;
        TileColumns<COLUMNS>* const columns =
            reinterpret_cast<TileColumns<COLUMNS>*>(staged + Size::STAGED_BYTES + (Size::BARRIERS * 8 + 15) / 16 * 16);
        multiply_tiles<T, Size>(maps, p, plan, stages, staged + group * Size::BUFFERS * Size::SUBTILE_BYTES, filled,
                                loaded + group, staged_full + group * Size::BUFFERS, columns[group], group, warp, lane);
    }
    sync_warp();
    cluster_arrive(), cluster_wait();  // the other block may still send here
#endif
}

}  // namespace vpd::gemm
