// Argmax over channels of a separable resize, without the resized logits.
//
// One thread per output pixel walks the channels. Neighbouring pixels read the same
// logits, so a warp's load is a broadcast of a few consecutive values out of L1, and the logits leave L2 once per row of
// blocks. Nothing but the labels is written.
#include "cuda/upsample_argmax.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace vpd {
namespace {

constexpr int BLOCK_X = 32, BLOCK_Y = 8, THREADS = BLOCK_X * BLOCK_Y;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

template <typename T, int TAPS>
__global__ void __launch_bounds__(THREADS) upsample_argmax_kernel(const CudaUpsampleArgmax p) {
    // Columns' taps are shared by the block; in registers, together with the rows', eight of them would spill.
    __shared__ int64_t column_offset[TAPS][BLOCK_X];
    __shared__ float column_weight[TAPS][BLOCK_X];
    const int64_t x = int64_t(blockIdx.x) * BLOCK_X + threadIdx.x;
    for (int t = threadIdx.y; t < TAPS && x < p.out_w; t += BLOCK_Y) {
        const int64_t source = p.columns.sources[x * TAPS + t];
        column_weight[t][threadIdx.x] = p.columns.weights[x * TAPS + t];
        column_offset[t][threadIdx.x] = source / p.w * p.stride_grid_x + source % p.w * p.stride_column;
    }
    __syncthreads();
    if (x >= p.out_w) return;

    // The grid is limited to 65535 along y and z, so threads stride over rows and images.
    for (int64_t y = int64_t(blockIdx.y) * BLOCK_Y + threadIdx.y; y < p.out_h; y += int64_t(gridDim.y) * BLOCK_Y) {
        int64_t row_offset[TAPS];
        float row_weight[TAPS];
#pragma unroll
        for (int t = 0; t < TAPS; ++t) {
            const int64_t source = p.rows.sources[y * TAPS + t];
            row_weight[t] = p.rows.weights[y * TAPS + t];
            row_offset[t] = source / p.h * p.stride_grid_y + source % p.h * p.stride_row;
        }
        for (int64_t image = blockIdx.z; image < p.batch; image += gridDim.z) {
            const T* channel = static_cast<const T*>(p.logits) + image * p.stride_batch;
            float best = -INFINITY;
            int label = 0;
#pragma unroll(TAPS == 2 ? 4 : 1)
            for (int c = 0; c < p.channels; ++c, channel += p.stride_channel) {
                float value = 0.0f;
#pragma unroll(TAPS <= 4 ? TAPS : 1)
                for (int s = 0; s < TAPS; ++s) {
                    const T* point = channel + column_offset[s][threadIdx.x];
                    float column = 0.0f;
#pragma unroll
                    for (int r = 0; r < TAPS; ++r) column = fmaf(row_weight[r], to_float(point[row_offset[r]]), column);
                    value = fmaf(column_weight[s][threadIdx.x], column, value);
                }
                // The first NaN wins, then the first of the largest values.
                if (value > best || (isnan(value) && !isnan(best))) {
                    best = value;
                    label = c;
                }
            }
            p.labels[(image * p.out_h + y) * p.out_w + x] = label;
        }
    }
}

template <typename T>
void launch(const CudaUpsampleArgmax& p, cudaStream_t stream) {
    const auto blocks = [](int64_t n, int64_t per_block, int64_t most) {
        const int64_t needed = (n + per_block - 1) / per_block;
        return static_cast<unsigned>(needed < most ? needed : most);
    };
    const dim3 block(BLOCK_X, BLOCK_Y);
    const dim3 grid(blocks(p.out_w, BLOCK_X, INT32_MAX), blocks(p.out_h, BLOCK_Y, 65535), blocks(p.batch, 1, 65535));
    if (p.taps == 2)
        upsample_argmax_kernel<T, 2><<<grid, block, 0, stream>>>(p);
    else if (p.taps == 4)
        upsample_argmax_kernel<T, 4><<<grid, block, 0, stream>>>(p);
    else
        upsample_argmax_kernel<T, 8><<<grid, block, 0, stream>>>(p);
}

}  // namespace

cudaError_t upsample_argmax_cuda(const CudaUpsampleArgmax& problem, CudaFloat dtype, cudaStream_t stream) {
    if (problem.batch == 0) return cudaSuccess;
    if (problem.taps != 2 && problem.taps != 4 && problem.taps != 8) return cudaErrorInvalidValue;
    switch (dtype) {
        case CudaFloat::float32: launch<float>(problem, stream); break;
        case CudaFloat::bfloat16: launch<__nv_bfloat16>(problem, stream); break;
        case CudaFloat::float16: launch<__half>(problem, stream); break;
    }
    return cudaGetLastError();
}

}  // namespace vpd
