// The scale and shift per channel that GroupNorm comes down to, of channels-last activations in one or two tensors.
//
// Statistics are gathered per channel, in one pass: float32 sums about a nearby value over blocks of rows, which double
// precision merges (Chan, Golub, LeVeque 1979). Which rows form a block depends on the shape alone.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vpd {

struct GroupNormAffinePlan {
    struct Source {
        const void* data;  // (batch, rows, channels); the last stride is 1
        bool bf16;         // element type: bfloat16, otherwise float32
        int64_t channels;
        int64_t image, row;  // strides in elements
        int64_t first;       // its place among the statistics of a chunk
    } sources[2];
    int64_t n_sources;
    int64_t batch, rows, groups;
    double eps;
    const float *weight, *bias;  // of all channels
    float* out;                  // (batch, 2, all channels): scale, shift

    int64_t chunk, chunks;  // rows of a chunk (the last has fewer), chunks of an image
    int64_t width;          // channels in the statistics, each source padded to whole vectors
};

}  // namespace vpd

// Work items of the first are (image, chunk), numbered image * chunks + chunk: it writes mean and sum of squared
// deviations, statistics[item][2][width]. Those of the second are images: it merges their chunks in place and writes
// out. Both do [first, last). scratch is aligned to 64 bytes and belongs to one thread.
VPD_DECLARE_PER_ISA(void group_norm_affine_statistics(const ::vpd::GroupNormAffinePlan& plan, double* statistics,
                                                      int64_t first, int64_t last, float* scratch);
                    void group_norm_affine_scale_shift(const ::vpd::GroupNormAffinePlan& plan, double* statistics,
                                                       int64_t first, int64_t last))
