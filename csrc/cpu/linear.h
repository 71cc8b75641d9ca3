// out = activation(prologue([x, x2]) weight^T + bias) + residual: see vpd_fast/ops/linear.py
#pragma once

#include "cpu/gemm.h"

namespace vpd {

struct LinearPlan {
    GemmPlan gemm;
    Source x[2];  // (images, rows, channels); the channels of a row of A are those of both
    bool norm;    // (a - mean) * rsqrt(variance + eps) over the row
    float eps;
    const float* affine;     // (images, 2, k): a * affine[0] + affine[1], or null
    const float* smoothing;  // (k): a * smoothing, or null
};

}  // namespace vpd

// Makes rows [first, first + count) of A, of all images, for gemm_panels. scratch: k + 32 floats, aligned to 64 bytes, of
// one thread.
VPD_DECLARE_PER_ISA(void linear_rows(const ::vpd::LinearPlan& plan, int64_t first, int64_t count, float* a,
                                     float* scratch))
