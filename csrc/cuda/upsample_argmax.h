// The CUDA form of csrc/cpu/upsample_argmax.h: one thread per output pixel.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace vpd {

// Sparse rows of equal length: output i reads sources[i * taps + t] with weights[i * taps + t], none of them zero.
struct CudaResamplingWeights {
    const int32_t* sources;
    const float* weights;
};

struct CudaUpsampleArgmax {
    const void* logits;  // (batch, grid_y, grid_x, channels, h, w)
    int64_t batch, grid_y, grid_x, channels, h, w;
    int64_t stride_batch, stride_grid_y, stride_grid_x, stride_channel, stride_row, stride_column;  // in elements
    int64_t* labels;  // (batch, out_h, out_w), contiguous
    int64_t out_h, out_w;
    CudaResamplingWeights rows, columns;
    int taps;  // 2, 4 or 8, for rows and columns
};

// Enqueues on the stream; returns the launch's error, or cudaErrorInvalidValue for another number of taps.
cudaError_t upsample_argmax_cuda(const CudaUpsampleArgmax& problem, CudaFloat dtype, cudaStream_t stream);

}  // namespace vpd
