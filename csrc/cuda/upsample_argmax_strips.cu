// Argmax over channels of a resize with two taps along both axes, a strip of pixels per thread.
//
// The pixels of a strip read the same four logits of a channel, whose sums over the rows' taps they share. Where channels
// are next to each other, two or four of them are loaded together. A strip with a sum that is not finite is computed once more,
// with comparisons that know NaN.
#include "cuda/upsample_argmax_strips.h"

#include "cuda/primitives.cuh"
#include "sizes.h"

namespace vpd {
namespace strips {
namespace {

using namespace device;

constexpr int THREADS = 128, AT_ONCE = 4;  // channels whose logits are on their way

// Logits of neighbouring channels, loaded together.
template <typename T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Neighbours {
    T v[WIDTH];
};

template <typename T>
__device__ inline float number(T x) {
    if constexpr (std::is_same_v<T, float>)
        return x;
    else
        return to_float(x);
}

// The weighted sum over the rows' taps, in the order of upsample_argmax.cu.
__device__ inline float sum_of_rows(const float (&weights)[2], float first, float second) {
    return fmaf(weights[1], second, fmaf(weights[0], first, 0.0f));
}

// Where the logits of a strip are: rows' taps x columns' taps, of the first channel.
struct Place {
    int64_t offset[2][2];
    float rows[2];
};

// Labels of one strip, from WIDTH channels at a time. EXACT: NaN wins, the first one; otherwise the result is whether there
// cannot have been any.
template <typename T, int WIDTH, bool EXACT>
__device__ inline bool labels_of_strip(const CudaUpsampleArgmax& p, const Place& place,
                                       const float (&weights)[MAX_STRIP][2], int (&labels)[MAX_STRIP]) {
    const T* const logits = static_cast<const T*>(p.logits);
    float best[MAX_STRIP], check = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_STRIP; ++i) best[i] = -INFINITY, labels[i] = 0;
    const auto add = [&](int channel, const float (&points)[2][2]) {
        const float first = sum_of_rows(place.rows, points[0][0], points[1][0]);
        const float second = sum_of_rows(place.rows, points[0][1], points[1][1]);
        if constexpr (!EXACT) check = fmaf(first, 0.0f, fmaf(second, 0.0f, check));
#pragma unroll
        for (int i = 0; i < MAX_STRIP; ++i) {
            const float value = fmaf(weights[i][1], second, fmaf(weights[i][0], first, 0.0f));
            // The first NaN wins, then the first of the largest values.
            const bool better = value > best[i] || (EXACT && value != value && best[i] == best[i]);
            labels[i] = better ? channel : labels[i];
            best[i] = EXACT ? (better ? value : best[i]) : fmaxf(best[i], value);
        }
    };
    int channel = 0;
#pragma unroll 1
    for (; channel + AT_ONCE <= p.channels; channel += AT_ONCE) {
        float points[AT_ONCE][2][2];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const T* from = logits + place.offset[t / 2][t % 2] + channel * p.stride_channel;
#pragma unroll
            for (int c = 0; c < AT_ONCE; c += WIDTH, from += WIDTH * p.stride_channel) {
                const auto several = load_global(reinterpret_cast<const Neighbours<T, WIDTH>*>(from));
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) points[c + j][t / 2][t % 2] = number(several.v[j]);
            }
        }
#pragma unroll
        for (int c = 0; c < AT_ONCE; ++c) add(channel + c, points[c]);
    }
#pragma unroll 1
    for (; channel < p.channels; ++channel) {
        float points[2][2];
#pragma unroll
        for (int t = 0; t < 4; ++t)
            points[t / 2][t % 2] =
                number(load_global(logits + place.offset[t / 2][t % 2] + channel * p.stride_channel));
        add(channel, points);
    }
    return check == 0.0f;
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS) strips_kernel(const CudaStrips call) {
    const CudaUpsampleArgmax& p = call.problem;
    const int64_t thread = int64_t(blockIdx.x) * THREADS + threadIdx.x, line = thread / call.strips;
    const int strip = int(thread - line * call.strips);
    if (line >= p.batch * p.out_h) return;
    const int64_t image = line / p.out_h, y = line - image * p.out_h;
    const int begin = load_global(call.begins + strip), count = load_global(call.begins + strip + 1) - begin;

    Place place;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t row = load_global(p.rows.sources + y * 2 + r);
        place.rows[r] = load_global(p.rows.weights + y * 2 + r);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const int64_t column = load_global(p.columns.sources + int64_t(begin) * 2 + s);
            place.offset[r][s] = image * p.stride_batch + row / p.h * p.stride_grid_y + row % p.h * p.stride_row +
                                 column / p.w * p.stride_grid_x + column % p.w * p.stride_column;
        }
    }
    float weights[MAX_STRIP][2];
#pragma unroll
    for (int i = 0; i < MAX_STRIP; ++i)
#pragma unroll
        for (int s = 0; s < 2; ++s)
            weights[i][s] = load_global(p.columns.weights + int64_t(begin + (i < count ? i : 0)) * 2 + s);

    int labels[MAX_STRIP];
    if (!labels_of_strip<T, WIDTH, false>(p, place, weights, labels))
        labels_of_strip<T, 1, true>(p, place, weights, labels);
    int64_t* const to = p.labels + line * p.out_w + begin;
#pragma unroll
    for (int i = 0; i < MAX_STRIP; ++i)
        if (i < count) store_global(to + i, int64_t(labels[i]));
}

// Whether logits of so many channels can be loaded together.
template <typename T, int WIDTH>
bool aligned(const CudaUpsampleArgmax& p) {
    const int64_t sizes[] = {p.batch, p.grid_y, p.grid_x, p.h, p.w};
    const int64_t strides[] = {p.stride_batch, p.stride_grid_y, p.stride_grid_x, p.stride_row, p.stride_column};
    bool fits = p.stride_channel == 1 && reinterpret_cast<uintptr_t>(p.logits) % sizeof(Neighbours<T, WIDTH>) == 0;
    for (int i = 0; i < 5; ++i) fits = fits && (sizes[i] == 1 || strides[i] % WIDTH == 0);
    return fits;
}

template <typename T>
cudaError_t launch(const CudaStrips& call, cudaStream_t stream) {
    const int64_t blocks = ceil_divide(call.problem.batch * call.problem.out_h * call.strips, THREADS);
    const auto launch = [&](auto kernel) { return launch_kernel(kernel, blocks, THREADS, 0, 1, stream, call); };
    if (aligned<T, 4>(call.problem)) return launch(strips_kernel<T, 4>);
    if (aligned<T, 2>(call.problem)) return launch(strips_kernel<T, 2>);
    return launch(strips_kernel<T, 1>);
}

}  // namespace
}  // namespace strips

cudaError_t upsample_argmax_strips_cuda(const CudaStrips& call, CudaFloat dtype, cudaStream_t stream) {
    if (call.problem.taps != 2) return cudaErrorInvalidValue;
    if (!(call.problem.batch * call.problem.out_h * call.strips)) return cudaSuccess;
    switch (dtype) {
        case CudaFloat::float32: return strips::launch<float>(call, stream);
        case CudaFloat::bfloat16: return strips::launch<device::Bfloat16>(call, stream);
        case CudaFloat::float16: return strips::launch<device::Float16>(call, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace vpd
