// Kernels of the prologue. Where each number is rounded alone, a thread has eight channels, whose scale and shift stay in
// its registers, and walks over positions. Where a position's numbers are normalised or rounded together, warps share it.
#pragma once

#include "cuda/prologue_numbers.cuh"

namespace vpd::prologue {

constexpr int UNROLL = 4;         // loads that a thread has on their way
constexpr int MAX_THREADS = 256;  // of a block that walks over positions
constexpr int MAX_WARPS = 16;     // that share a row
constexpr int ROWS = 4;           // of a block whose warps have a row each
// That a processor has registers for.
template <typename In, bool FACTORS>
constexpr int BLOCKS = sizeof(In) == 4 ? 2
                       : FACTORS       ? 3
                                       : 4;

// Threads of a block: `tile` vectors of a position side by side, `rows` positions at a time.
struct PositionsPlan {
    int vectors, tile, tiles, rows, threads;
    int chunk, chunks;  // positions of a block; blocks of a line of the padded image
    int64_t blocks;
};

__device__ inline int lesser(int a, int b) { return a < b ? a : b; }
__device__ inline int greater(int a, int b) { return a < b ? b : a; }

struct RowsPlan {
    int vectors, warps;  // of a row
    int threads, rows;   // of a block, at a time
    int64_t blocks_of_image, blocks;
};

// Where eight channels of both sources are.
template <typename In>
struct Place {
    const In* from;
    int64_t row, column;

    __device__ Place(const CudaPrologue& p, int64_t image, int64_t channel) {
        const bool second = channel >= p.channels[0];
        const CudaPositions& source = p.source[second];
        row = source.row, column = source.column;
        from = static_cast<const In*>(source.data) + image * source.image + (channel - (second ? p.channels[0] : 0));
    }
};

// What becomes of eight channels before they are rounded.
template <bool SILU, bool FACTORS>
struct Change {
    float scale[CHANNELS], shift[CHANNELS], factor[FACTORS ? CHANNELS : 1];

    __device__ Change(const CudaPrologue& p, int64_t image, int64_t channel) {
        const int64_t channels = p.channels[0] + p.channels[1], offset = image * 2 * channels + channel;
        load_numbers(p.scale_shift, offset, 1.0f, scale);
        load_numbers(p.scale_shift, offset + channels, -0.0f, shift);  // x + -0 is x, also where x is -0
        if constexpr (FACTORS) load_numbers(p.factors, channel, 1.0f, factor);
    }
    __device__ void apply(float (&a)[CHANNELS]) const {
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) {
            a[i] = fmaf(a[i], scale[i], shift[i]);
            if constexpr (SILU) a[i] = silu(a[i]);
            if constexpr (FACTORS) a[i] = multiply_rounded(a[i], factor[i]);
        }
    }
};

// The range of an image from those of its parts, by every warp.
__device__ inline Range range_of_image(const CudaPrologue& p, int64_t image) {
    Range r;
    const float* const ranges = p.ranges + image * 2 * p.parts;
    for (int64_t i = threadIdx.x % WARP; i < p.parts; i += WARP)
        r.add(load_global(ranges + i)), r.add(load_global(ranges + p.parts + i));
    return range_of_warp(r);
}

// The range of all warps' ranges; every thread of the block comes here. With several calls in a row, a barrier must lie
// between them.
__device__ inline Range range_of_block(Range r, int first_warp, int warps) {
    float* const memory = reinterpret_cast<float*>(dynamic_shared());
    r = range_of_warp(r);
    float* const own = memory + threadIdx.x / WARP * 3;
    if (threadIdx.x % WARP == 0) own[0] = r.low, own[1] = r.high, own[2] = r.check;
    __syncthreads();
    for (int i = 0; i < warps; ++i) {
        const float* const other = memory + (first_warp + i) * 3;
        r.low = fminf(r.low, other[0]), r.high = fmaxf(r.high, other[1]), r.check += other[2];
    }
    return r;
}

// Numbers rounded alone, or none: then the range of the block's numbers is written.
template <typename In, typename Out, bool SILU, bool FACTORS, bool RANGE>
__global__ void __launch_bounds__(MAX_THREADS, BLOCKS<In, FACTORS>)
    positions_kernel(const CudaPrologue p, const PositionsPlan plan) {
    using Number = typename Rounded<Out>::Number;
    constexpr bool EIGHT = sizeof(typename Rounded<Out>::Words) == CHANNELS;
    const int64_t block = blockIdx.x, line = block / (plan.chunks * plan.tiles);
    const int within = int(block - line * (plan.chunks * plan.tiles));
    const int64_t image = line / p.tall;
    const int y = int(line - image * p.tall), chunk = within / plan.tiles, tile = within - chunk * plan.tiles;

    Step step{};
    if constexpr (EIGHT && !RANGE) {
        const Range range = range_of_image(p, image);
        step = step_of<Out>(range.least(), range.high);
        if (y == 0 && within == 0 && threadIdx.x == 0) {
            store_global(p.scales + image, step.scale);
            if (p.zeros) store_global(p.zeros + image, step.zero - 128.0f);
        }
    }
    Range found;
    const int side = int(threadIdx.x) / plan.tile, vector = tile * plan.tile + int(threadIdx.x) - side * plan.tile;
    if (side < plan.rows && vector < plan.vectors) {
        const int64_t channel = int64_t(vector) * CHANNELS, channels = p.channels[0] + p.channels[1];
        const int left = int(p.left), right = int(p.left + p.width);
        const int first = chunk * plan.chunk, last = lesser(first + plan.chunk, int(p.wide));
        const bool inside = y >= p.top && y < p.top + p.height;
        const int begin = inside ? greater(first, left) : last, end = inside ? lesser(last, right) : last;
        Number* const to_line = static_cast<Number*>(p.out) + (line * p.wide) * channels + channel;
        if constexpr (!RANGE) {
            const float none[CHANNELS] = {};
            const auto words = Rounded<Out>::of(none, step);
            for (int x = first + side; x < lesser(begin, last); x += plan.rows)
                store<Out>(to_line + x * channels, words);
            for (int x = greater(end, first) + side; x < last; x += plan.rows)
                store<Out>(to_line + x * channels, words);
        }
        const Change<SILU, FACTORS> change(p, image, channel);
        const Place<In> place(p, image, channel);
        const In* from = place.from + (y - p.top) * place.row + int64_t(begin + side - left) * place.column;
        Number* to = to_line + int64_t(begin + side) * channels;
        const int64_t from_step = plan.rows * place.column, to_step = plan.rows * channels;
        const auto finish = [&](const Vector<In>& words, Number* where) {
            float a[CHANNELS];
            words.unpack_to(a);
            change.apply(a);
            if constexpr (RANGE) {
#pragma unroll
                for (int i = 0; i < CHANNELS; ++i) found.add(a[i]);
            } else {
                store<Out>(where, Rounded<Out>::of(a, step));
            }
        };
        // A vector is loaded again as soon as it is finished, so that all of them are always on their way.
        int x = begin + side;
        Vector<In> words[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i, from += from_step)
            if (x + i * plan.rows < end) words[i] = Vector<In>::load(from);
#pragma unroll 1
        for (; x + (UNROLL - 1) * plan.rows < end; x += UNROLL * plan.rows) {
#pragma unroll
            for (int i = 0; i < UNROLL; ++i, from += from_step, to += to_step) {
                finish(words[i], to);
                if (x + (UNROLL + i) * plan.rows < end) words[i] = Vector<In>::load(from);
            }
        }
#pragma unroll
        for (int i = 0; i < UNROLL - 1; ++i)
            if (x + i * plan.rows < end) finish(words[i], to + i * to_step);
    }
    if constexpr (RANGE) {
        found = range_of_block(found, 0, plan.threads / WARP);
        if (threadIdx.x == 0) {
            float* const to = p.ranges + image * 2 * p.parts + y * (plan.chunks * plan.tiles) + within;
            store_global(to, found.least()), store_global(to + p.parts, found.high);
        }
    }
}

// The sum over the threads that share a row; every thread of the block comes here.
template <bool ALONE>
__device__ inline float sum_of_row(float x, int warps) {
    for (int mask = WARP / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
    if (ALONE) return x;
    float* const memory = reinterpret_cast<float*>(dynamic_shared());
    __syncthreads();  // nobody reads what was there any more
    if (threadIdx.x % WARP == 0) memory[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0.0f;
    for (int i = 0; i < warps; ++i) x += memory[i];
    return x;
}

template <bool ALONE>
__device__ inline Range range_of_row(Range r, int warps) {
    if (ALONE) return range_of_warp(r);
    __syncthreads();
    return range_of_block(r, 0, warps);
}

// Rows that are normalised or rounded together: there is one line, and nothing around it. ALONE: a warp has a row for
// itself, and reads the next one while it computes; otherwise the warps of a block share one.
template <typename In, typename Out, bool ALONE>
__global__ void __launch_bounds__(WARP*(ALONE ? ROWS : MAX_WARPS))
    rows_kernel(const CudaPrologue p, const RowsPlan plan) {
    using Number = typename Rounded<Out>::Number;
    constexpr bool EIGHT = sizeof(typename Rounded<Out>::Words) == CHANNELS;
    const int64_t image = blockIdx.x / plan.blocks_of_image, first = blockIdx.x - image * plan.blocks_of_image;
    const int team = plan.warps * WARP, side = int(threadIdx.x) / team, thread = int(threadIdx.x) - side * team;
    const int64_t channels = p.channels[0] + p.channels[1], step = plan.blocks_of_image * plan.rows;
    const Place<In> one(p, image, 0), two(p, image, p.channels[0]);
    Vector<In> words[UNROLL];
    const auto load = [&](int64_t row) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int channel = (thread + i * team) * CHANNELS, rest = channel - int(p.channels[0]);
            if (row >= p.width || channel >= channels) continue;
            words[i] = rest < 0 ? Vector<In>::load(one.from + row * one.column + channel)
                                : Vector<In>::load(two.from + row * two.column + rest);
        }
    };
    int64_t row = first * plan.rows + side;
    if (ALONE) load(row);
    for (int64_t start = first * plan.rows; start < p.width; start += step, row += step) {
        if (!ALONE) load(row);
        float a[UNROLL][CHANNELS];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            if (row < p.width && thread + i * team < plan.vectors) {
                words[i].unpack_to(a[i]);
            } else {
#pragma unroll
                for (float& x : a[i]) x = 0.0f;
            }
        }
        if (ALONE) load(row + step);
        if (p.norm) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < UNROLL; ++i)
#pragma unroll
                for (const float x : a[i]) sum += x;
            const float mean = sum_of_row<ALONE>(sum, plan.warps) / float(channels);
            sum = 0.0f;
#pragma unroll
            for (int i = 0; i < UNROLL; ++i)
                if (thread + i * team < plan.vectors) {
#pragma unroll
                    for (float& x : a[i]) x -= mean, sum = fmaf(x, x, sum);
                }
            const float variance = sum_of_row<ALONE>(sum, plan.warps) / float(channels);
            const float inverse = 1.0f / sqrtf(variance + p.eps);
#pragma unroll
            for (int i = 0; i < UNROLL; ++i)
#pragma unroll
                for (float& x : a[i]) x *= inverse;
        }
        Range range;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int64_t channel = int64_t(thread + i * team) * CHANNELS;
            if (channel >= channels) continue;
            if (p.scale_shift) {
                const Change<false, false> change(p, image, channel);
                change.apply(a[i]);
            }
            if (p.silu) {
#pragma unroll
                for (float& x : a[i]) x = silu(x);
            }
            if (p.factors) {
                float factor[CHANNELS];
                load_numbers(p.factors, channel, 1.0f, factor);
#pragma unroll
                for (int j = 0; j < CHANNELS; ++j) a[i][j] = multiply_rounded(a[i][j], factor[j]);
            }
            if constexpr (EIGHT) {
#pragma unroll
                for (const float x : a[i]) range.add(x);
            }
        }
        Step rounding{};
        const int64_t place = image * p.width + row;
        if constexpr (EIGHT) {
            range = range_of_row<ALONE>(range, plan.warps);
            rounding = step_of<Out>(range.least(), range.high);
            if (thread == 0 && row < p.width) {
                store_global(p.scales + place, rounding.scale);
                if (p.zeros) store_global(p.zeros + place, rounding.zero - 128.0f);
            }
        }
        Number* const to = static_cast<Number*>(p.out) + place * channels;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int64_t channel = int64_t(thread + i * team) * CHANNELS;
            if (row < p.width && channel < channels) store<Out>(to + channel, Rounded<Out>::of(a[i], rounding));
        }
    }
}

}  // namespace vpd::prologue
