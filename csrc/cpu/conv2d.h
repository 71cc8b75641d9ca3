// Convolution of NHWC images as a GEMM whose left operand (im2col) exists only in the cache: see
// vpd_fast/ops/conv2d.py
#pragma once

#include "cpu/gemm.h"

namespace vpd {

struct Conv2dPlan {
    GemmPlan gemm;  // a row for each output position; k = (dy * kernel_w + dx) * channels + channel
    Source x[2];    // (images, height, width, channels); the channels are those of both
    int64_t height, width, out_width;
    int64_t kernel_h, kernel_w, stride, top, left;  // zeros above and beside the image, after the transform
    const float* affine;                            // (images, 2, channels): x * affine[0] + affine[1], or null
    bool silu;                                      // then silu(x)
    const float* smoothing;                         // (channels): then x * smoothing, or null
};

}  // namespace vpd

// Makes rows [first, first + count) of A, of all images, for gemm_panels. scratch: k + 32 floats, aligned to 64 bytes, of
// one thread.
VPD_DECLARE_PER_ISA(void conv2d_rows(const ::vpd::Conv2dPlan& plan, int64_t first, int64_t count, float* a,
                                     float* scratch))
