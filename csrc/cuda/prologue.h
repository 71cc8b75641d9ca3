// What `linear` and `conv2d` do before the product: channels of one or two sources are joined, normalised, activated and
// rounded, with zeros around the image.
//
//     a = cat(sources); with `norm` (a - mean) / sqrt(variance + eps) over the channels of a position
//     a = silu(a * scale_shift[0] + scale_shift[1]) * factors, of which any part may be missing
//
// and then 16 bits, or 8 bits with scales and zeros as vpd_fast/ops/rounding.py defines them; zeros around the image are
// rounded like every number. All arithmetic is float32. Bitwise repeatable.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/gemm.h"

namespace vpd {

struct CudaPrologue {
    int64_t batch, height, width;
    int64_t top, left, tall, wide;  // zeros before the first row and column; height and width with all zeros
    CudaPositions source[2];        // (batch, height, width, channels); read only
    int64_t channels[2];            // the second is 0 if there is one source
    CudaFloat dtype;                // of the sources
    const float* scale_shift;       // (batch, 2, channels of both) or null
    const float* factors;           // (channels of both) or null
    bool norm, silu;
    float eps;
    void* out;  // (batch, tall, wide, channels of both), contiguous
    CudaOperand out_dtype;
    // Of 8 bits: a ~ scales * (stored - zeros), for every position or every image. zeros is for int8 only.
    float *scales, *zeros;
    float* ranges;  // (batch, 2, parts): least and largest numbers of parts of each image
    int64_t parts;
};

enum class CudaRounding {
    plain,  // to 16 bits
    row,    // to 8 bits, with a scale for each position
    image,  // to 8 bits, with a scale for each image, from `ranges`
    range   // nothing is rounded: `ranges` is written, of as many parts as prologue_cuda_parts() says
};

// nullptr if the prologue can run on the current device, else the reason why it cannot.
const char* prologue_cuda_refuses(const CudaPrologue& problem, CudaRounding rounding);

// Parts of an image whose ranges CudaRounding::range writes on the current device.
int64_t prologue_cuda_parts(const CudaPrologue& problem);

// Enqueues on the stream of the current device; returns the launch's error, or cudaErrorInvalidValue if it is refused.
cudaError_t prologue_cuda(const CudaPrologue& problem, CudaRounding rounding, cudaStream_t stream);

}  // namespace vpd
