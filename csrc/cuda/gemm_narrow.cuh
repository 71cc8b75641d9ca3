// Kernel of convolutions that read few numbers per position. A block has up to 128 columns of the result and walks over
// tiles of 64 positions of an image. Its threads gather what the next tile reads, a row of K per position, while they
// multiply the present one by mma.sync.
//
// A warp has 32 columns, whose weight stays in its registers. Fragments take them in such an order that a thread's numbers
// of four fragments are eight neighbours: they leave as 16 bytes, with no way through shared memory, and a thread finds the
// statistics of its columns over all positions of a run, about the run's first number.
#pragma once

#include "cuda/gemm_epilogue_wide.cuh"

namespace vpd::narrow {

using namespace gemm;

constexpr int WARPS = 4, THREADS = WARPS * WARP, TILE = 64, COLUMNS = 128, COLUMNS_OF_WARP = COLUMNS / WARPS;
constexpr int FRAGMENT = 16;             // rows and numbers of K of a matrix instruction
constexpr int MAX_STEPS = 4;             // of K
constexpr int GATHERS = THREADS / TILE;  // threads that gather a row
constexpr int NOWHERE = -(1 << 30);      // a place outside of every image

// That a processor has registers for.
template <int STEPS>
constexpr int BLOCKS = STEPS == MAX_STEPS ? 2 : 3;

struct NarrowPlan {
    int positions, tiles;  // of an image
    int chunk, chunks;     // tiles of a block; blocks of an image that have the same columns
    int across;            // blocks side by side
    int columns;           // of the weight
    int tiles_of_run;      // of statistics; 0: none are found
};

// What a column of the weight reads, from the first number that a position reads.
struct alignas(8) Tap {
    int32_t offset;
    int16_t dy, dx;
};

struct alignas(16) Place {
    int64_t out, residual;  // out < 0: there is no such position
};

template <int STEPS>
struct NarrowShared {
    static constexpr int PITCH = STEPS * FRAGMENT * 2 + 16;  // rows of 8 matrices then begin in different banks
    Tap taps[STEPS * FRAGMENT];
    Place places[2][TILE];
    alignas(16) float bias[COLUMNS];
    alignas(16) unsigned char rows[2][TILE * PITCH];
};

__device__ inline Tap tap_of(const CudaGemm& p, const NarrowPlan& plan, int column) {
    const int channels = int(p.channels[0]), tap = column / channels, dy = tap / int(p.kernel_width);
    const int dx = tap - dy * int(p.kernel_width);
    if (column >= plan.columns) return {0, INT16_MIN, INT16_MIN};
    return {int32_t(dy * p.source[0].row + dx * p.source[0].column + column - tap * channels), int16_t(dy),
            int16_t(dx)};
}

template <typename In>
__device__ inline float number_of(In x) {
    if constexpr (std::is_same_v<In, float>)
        return x;
    else
        return to_float(x);
}

// What a thread gathers of the next tile.
template <int STEPS>
struct Gathered {
    static constexpr int COUNT = STEPS * FRAGMENT / GATHERS;
    float numbers[COUNT];

    __device__ void load(const CudaGemm& p, CudaFloat dtype, const NarrowPlan& plan, const Tap* taps, int64_t image,
                         int position, Place* place) {
        const bool exists = position < plan.positions;
        const int y = position / int(p.out_width), x = position - y * int(p.out_width);
        if (place)
            *place = {exists ? image * p.out.image + y * p.out.row + x * p.out.column : -1,
                      image * p.residual.image + y * p.residual.row + x * p.residual.column};
        const int top = exists ? y * int(p.stride) - int(p.top) : NOWHERE, left = x * int(p.stride) - int(p.left);
        switch (dtype) {
            case CudaFloat::float32: return load_from<float>(p, taps, image, top, left);
            case CudaFloat::bfloat16: return load_from<Bfloat16>(p, taps, image, top, left);
            case CudaFloat::float16: return load_from<Float16>(p, taps, image, top, left);
        }
    }
    template <typename In>
    __device__ void load_from(const CudaGemm& p, const Tap* taps, int64_t image, int top, int left) {
        const CudaPositions& source = p.source[0];
        const In* const from =
            static_cast<const In*>(source.data) + image * source.image + top * source.row + left * source.column;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const Tap tap = taps[i];
            const int y = top + tap.dy, x = left + tap.dx;
            numbers[i] = 0.0f;
            if (unsigned(y) < unsigned(p.height) && unsigned(x) < unsigned(p.width))
                numbers[i] = number_of(load_global(from + tap.offset));
        }
    }
    template <typename T>
    __device__ void put(unsigned char* row) const {
#pragma unroll
        for (int i = 0; i < COUNT; i += 8) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) words[j] = pack<T>(numbers[i + 2 * j], numbers[i + 2 * j + 1]);
            *reinterpret_cast<uint4*>(row + i * 2) = {words[0], words[1], words[2], words[3]};
        }
    }
};

__device__ inline void unpack_to(const Eight<float>& from, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = from.low.v[i], x[4 + i] = from.high.v[i];
}
template <typename Number>
__device__ inline void unpack_to(const Eight<Number>& from, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack<Number>(from.words[i], x[2 * i], x[2 * i + 1]);
}

// The sum over the threads that have the same columns.
__device__ inline float over_rows(float x) {
#pragma unroll
    for (int mask = 4; mask < WARP; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

// Of eight columns, of the positions of a run that a thread has; all threads of a column begin with the same number.
struct ColumnStatistics : RunningStatistics<8> {
    __device__ void begin(const float (&numbers)[8], int lane) {
        float first[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) first[i] = over_rows(lane < 4 ? numbers[i] : 0.0f);
        RunningStatistics::begin(first);
    }
    // Over all threads of a column, which come here together.
    __device__ void join() {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            total[i] = over_rows(total[i]), squares[i] = over_rows(squares[i]);
#pragma unroll
            for (int mask = 4; mask < WARP; mask *= 2) {
                low[i] = fminf(low[i], shuffle_xor(low[i], mask));
                high[i] = fmaxf(high[i], shuffle_xor(high[i], mask));
            }
        }
    }
};

// The weight of a warp's columns. Of the columns 8t to 8t + 7 of the warp, those of thread t of four, fragment j has 2j
// and 2j + 1.
template <int STEPS>
struct WeightFragments {
    uint32_t words[STEPS][4][2];

    __device__ WeightFragments(const CudaGemm& p, const NarrowPlan& plan, int first, int lane) {
        const uint16_t* const weight = static_cast<const uint16_t*>(p.weight);
        const int of_warp = lane / 8 * 8 + lane / 4 % 2;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int64_t row = first + of_warp + i / 2 * 2;
                const int k = step * FRAGMENT + i % 2 * 8 + lane % 4 * 2;
                const auto word = [&](int column) -> uint32_t {
                    if (row >= p.n || column >= plan.columns) return 0;
                    return load_global(weight + row * plan.columns + column);
                };
                words[step][i / 2][i % 2] = word(k) | word(k + 1) << 16;
            }
    }
};

template <typename T, typename Number, int STEPS>
__global__ void __launch_bounds__(THREADS, BLOCKS<STEPS>)
    narrow_kernel(const CudaGemm p, const CudaFloat dtype, const NarrowPlan plan) {
    using Shared = NarrowShared<STEPS>;
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    const int warp = same_in_warp(threadIdx.x / WARP), lane = threadIdx.x % WARP;
    const int64_t walk = blockIdx.x / plan.across, image = walk / plan.chunks;
    const int begin = int(walk - image * plan.chunks) * plan.chunk;
    const int end = begin + plan.chunk < plan.tiles ? begin + plan.chunk : plan.tiles;
    const int of_warp = int(blockIdx.x - walk * plan.across) * COLUMNS + warp * COLUMNS_OF_WARP;
    const int column = of_warp + lane % 4 * 8;
    const bool multiplies = of_warp < p.n, exists = column < p.n;

    for (int i = threadIdx.x; i < STEPS * FRAGMENT; i += THREADS) shared.taps[i] = tap_of(p, plan, i);
    for (int i = threadIdx.x; i < COLUMNS; i += THREADS) {
        const int64_t place = of_warp - warp * COLUMNS_OF_WARP + i;
        shared.bias[i] = p.bias && place < p.n ? load_global(p.bias + place) : 0.0f;
    }
    __syncthreads();
    const int row = threadIdx.x % TILE, part = threadIdx.x / TILE * Gathered<STEPS>::COUNT;
    Gathered<STEPS> next;
    const auto load = [&](int tile, int buffer) {
        Place* const place = part == 0 ? &shared.places[buffer][row] : nullptr;  // nobody reads that any more
        next.load(p, dtype, plan, shared.taps + part, image, tile * TILE + row, place);
    };
    const auto put = [&](int buffer) { next.template put<T>(shared.rows[buffer] + row * Shared::PITCH + part * 2); };
    load(begin, 0);
    put(0);

    const WeightFragments<STEPS> weight(p, plan, of_warp, lane);
    const Number* const residual = p.residual.data ? static_cast<const Number*>(p.residual.data) + column : nullptr;
    Number* const out = static_cast<Number*>(p.out.data) + column;
    const float* const own_bias = shared.bias + warp * COLUMNS_OF_WARP + lane % 4 * 8;
    ColumnStatistics statistics;
    __syncthreads();

    const auto multiply = [&](int tile, int buffer) {
#pragma unroll 1
        for (int first = 0; first < TILE; first += FRAGMENT) {
            float sums[4][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                uint32_t a[4];
                load_matrices(a,
                              shared.rows[buffer] + (first + lane % 16) * Shared::PITCH + step * 32 + lane / 16 * 16);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    multiply_add<T>(sums[j], a, weight.words[step][j][0], weight.words[step][j][1]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Place place = shared.places[buffer][first + half * 8 + lane / 4];
                const bool stores = exists && place.out >= 0;
                const Four<float>* const bias = reinterpret_cast<const Four<float>*>(own_bias);
                float x[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) x[i] = sums[i / 2][half * 2 + i % 2] + bias[i / 4].v[i % 4];
                if (p.activation == CudaActivation::relu)
#pragma unroll
                    for (int i = 0; i < 8; ++i) x[i] = activated(CudaActivation::relu, x[i]);
                if (residual && stores) Eight<Number>::load(residual + place.residual).add_to(x);
                const Eight<Number> stored = Eight<Number>::of(x);
                if (stores) stored.store(out + place.out);
                if (!plan.tiles_of_run) continue;
                float numbers[8];
                unpack_to(stored, numbers);
                if (half == 0 && first == 0 && tile % plan.tiles_of_run == 0) statistics.begin(numbers, lane);
                statistics.add(numbers);
            }
        }
        if (!plan.tiles_of_run || (tile + 1) % plan.tiles_of_run) return;
        const int run = tile / plan.tiles_of_run;
        float* const to = p.statistics + image * p.statistics_image + int64_t(run) * PLANES * p.n + column;
        statistics.join();
        if (exists && lane < 4) statistics.store(to, p.n, 1.0f / float(plan.tiles_of_run * TILE));
    };
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
        const int buffer = (tile - begin) & 1;
        const bool more = tile + 1 < end;
        if (more) load(tile + 1, buffer ^ 1);
        if (multiplies) multiply(tile, buffer);
        if (more) put(buffer ^ 1);
        __syncthreads();
    }
}

}  // namespace vpd::narrow
