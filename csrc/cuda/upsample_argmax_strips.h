// upsample_argmax for two taps along both axes: a thread has a strip of neighbouring pixels of a row that read the same
// logits. Labels are those of upsample_argmax.h, whose operations are done in the same order.
#pragma once

#include "cuda/upsample_argmax.h"

namespace vpd {

constexpr int MAX_STRIP = 8;  // pixels

struct CudaStrips {
    CudaUpsampleArgmax problem;  // taps is 2
    // Strip i has the pixels begins[i] to begins[i + 1] - 1 of each row, at most MAX_STRIP.
    const int32_t* begins;
    int64_t strips;
};

// Enqueues on the stream; returns the launch's error, or cudaErrorInvalidValue for another number of taps.
cudaError_t upsample_argmax_strips_cuda(const CudaStrips& call, CudaFloat dtype, cudaStream_t stream);

}  // namespace vpd
