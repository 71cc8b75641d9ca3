#include "cpu/group_norm_affine.h"

#include "cpu/elementwise.h"

namespace vpd::VPD_ISA {
namespace {

constexpr int64_t BLOCK = 64;          // rows that are summed in float32 before double precision takes over
constexpr int64_t ROWS = 8;            // rows that are summed together
constexpr int64_t PREFETCH_ROWS = 32;  // distance of prefetched rows from those that are summed
constexpr int64_t LINE = 64;           // bytes of a cache line

// Running sums per channel of a block, in float32: an origin near the mean, and the sums of the deviations from it and of
// their squares.
struct Sums {
    float *origin, *deviations, *squares;
};

// Calls function(c, n) for vectors of n channels from c on; n is known to be 16 for all but the last.
template <typename Function>
VPD_INLINE void for_each_vector(int64_t channels, Function function) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) function(c, int64_t{LANES});
    if (c < channels) function(c, channels - c);
}

template <typename T>
VPD_INLINE f32x16 load_vector(const T* p, int64_t n) {
    return n == LANES ? load(p) : load_part(p, n);
}

// Sets the origin to the mean of a few rows. It is near enough to the block's mean: with k of the n rows of the block,
// n * (origin - mean)^2 <= n / k * (sum of squared deviations), so the squares are at most 1 + n / k times as large as
// they need to be, whatever the values are.
template <typename T>
void set_origin(const T* x, int64_t row, int64_t rows, int64_t channels, Sums sums) {
    const f32x16 weight = broadcast(1.0f / static_cast<float>(rows)), zero = broadcast(0.0f);
    for_each_vector(channels, [&](int64_t c, int64_t n) {
        f32x16 sum = zero;
        for (int64_t r = 0; r < rows; ++r) sum = multiply_add(load_vector(x + r * row + c, n), weight, sum);
        store(sums.origin + c, sum), store(sums.deviations + c, zero), store(sums.squares + c, zero);
    });
}

template <int BLOCK_ROWS, typename T>
void add_rows(const T* x, int64_t row, int64_t channels, Sums sums) {
    for_each_vector(channels, [&](int64_t c, int64_t n) {
        const f32x16 origin = load(sums.origin + c);
        f32x16 deviations = load(sums.deviations + c), squares = load(sums.squares + c);
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK_ROWS; ++r) {
            const f32x16 d = subtract(load_vector(x + r * row + c, n), origin);
            deviations = add(deviations, d), squares = multiply_add(d, d, squares);
        }
        store(sums.deviations + c, deviations), store(sums.squares + c, squares);
    });
}

// Columns of ROWS rows are not the order in which the hardware expects memory to be read. Prefetching doubles the speed.
template <typename T>
VPD_INLINE void fetch_rows(const T* x, int64_t row, int64_t channels) {
    for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t c = 0; c < channels; c += LINE / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(x + r * row + c, 0, 2);  // into the second cache level
}

// Merges statistics of `count` rows into those of `before` rows, for one channel.
VPD_INLINE void merge(double& mean, double& m2, double before, double other_mean, double other_m2, double count) {
    const double delta = other_mean - mean, share = count / (before + count);
    mean += delta * share;
    m2 += other_m2 + delta * delta * (before * share);
}

template <typename T>
void add_statistics(const GroupNormAffinePlan::Source& source, int64_t image, int64_t first, int64_t last, Sums sums,
                    double* __restrict mean, double* __restrict m2) {
    const int64_t width = padded(source.channels);
    for (int64_t c = 0; c < width; ++c) mean[c] = m2[c] = 0;
    for (int64_t block = first; block < last; block += BLOCK) {
        const int64_t rows = last - block < BLOCK ? last - block : BLOCK;
        const T* x = static_cast<const T*>(source.data) + image * source.image + block * source.row;
        set_origin(x, source.row, rows < ROWS ? rows : ROWS, source.channels, sums);
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS) {
            fetch_rows(x + (r + PREFETCH_ROWS) * source.row, source.row, source.channels);
            add_rows<ROWS>(x + r * source.row, source.row, source.channels, sums);
        }
        for (; r < rows; ++r) add_rows<1>(x + r * source.row, source.row, source.channels, sums);
        const double before = static_cast<double>(block - first), count = static_cast<double>(rows);
        for (int64_t c = 0; c < width; ++c) {
            const double deviation = sums.deviations[c] / count;  // of the block's mean from the origin
            const double block_m2 = sums.squares[c] - count * deviation * deviation;
            merge(mean[c], m2[c], before, sums.origin[c] + deviation, block_m2, count);
        }
    }
}

// Index of a channel, numbered through both sources, among the statistics, which are padded between the sources.
VPD_INLINE int64_t statistics_index(const GroupNormAffinePlan& plan, int64_t channel) {
    const int64_t beyond = channel - plan.sources[0].channels;
    return beyond < 0 ? channel : plan.sources[1].first + beyond;
}

}  // namespace

void group_norm_affine_statistics(const GroupNormAffinePlan& plan, double* statistics, int64_t first, int64_t last,
                                  float* scratch) {
    const Sums sums{scratch, scratch + plan.width, scratch + 2 * plan.width};
    for (int64_t item = first; item < last; ++item) {
        const int64_t image = item / plan.chunks, begin = item % plan.chunks * plan.chunk;
        const int64_t end = begin + plan.chunk < plan.rows ? begin + plan.chunk : plan.rows;
        double *mean = statistics + 2 * item * plan.width, *m2 = mean + plan.width;
        for (int64_t s = 0; s < plan.n_sources; ++s) {
            const GroupNormAffinePlan::Source& source = plan.sources[s];
            if (source.bf16)
                add_statistics<uint16_t>(source, image, begin, end, sums, mean + source.first, m2 + source.first);
            else
                add_statistics<float>(source, image, begin, end, sums, mean + source.first, m2 + source.first);
        }
    }
}

void group_norm_affine_scale_shift(const GroupNormAffinePlan& plan, double* statistics, int64_t first, int64_t last) {
    const int64_t channels = plan.sources[0].channels + plan.sources[1].channels, size = channels / plan.groups;
    for (int64_t image = first; image < last; ++image) {
        double* __restrict mean = statistics + 2 * image * plan.chunks * plan.width;
        double* __restrict m2 = mean + plan.width;
        for (int64_t i = 1; i < plan.chunks; ++i) {
            const double *other_mean = mean + 2 * i * plan.width, *other_m2 = other_mean + plan.width;
            const int64_t before = i * plan.chunk, left = plan.rows - before;
            const auto count = static_cast<double>(left < plan.chunk ? left : plan.chunk);
            for (int64_t c = 0; c < plan.width; ++c)
                merge(mean[c], m2[c], static_cast<double>(before), other_mean[c], other_m2[c], count);
        }
        float *scale = plan.out + 2 * image * channels, *shift = scale + channels;
        for (int64_t begin = 0; begin < channels; begin += size) {
            double group_mean = 0, group_m2 = 0;
            for (int64_t c = begin; c < begin + size; ++c) group_mean += mean[statistics_index(plan, c)];
            group_mean /= static_cast<double>(size);
            for (int64_t c = begin; c < begin + size; ++c) {
                const double delta = mean[statistics_index(plan, c)] - group_mean;
                group_m2 += m2[statistics_index(plan, c)] + static_cast<double>(plan.rows) * delta * delta;
            }
            const double variance = group_m2 / static_cast<double>(plan.rows * size);
            const double reciprocal = 1 / __builtin_sqrt(variance + plan.eps);
            for (int64_t c = begin; c < begin + size; ++c) {
                const double factor = plan.weight[c] * reciprocal;
                scale[c] = static_cast<float>(factor);
                shift[c] = static_cast<float>(plan.bias[c] - group_mean * factor);
            }
        }
    }
}

}  // namespace vpd::VPD_ISA
