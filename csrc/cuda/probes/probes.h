// Kernels that ask what the hardware does. They belong to module _C_probes, which measurements use and no wheel has.
//
// Each wait inside them is bounded: a probe that is wrong ends, and says so, instead of hanging.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace vpd::probes {

enum class Operand { int8, float8_e4m3fn, bfloat16 };

// Every block copies boxes of `lines` lines of 128 bytes from a region of `region` lines through a ring of stages.
// cluster: blocks that each load a part of every box and send it to all of them.
struct Copies {
    const void* source;
    int64_t region;
    int blocks, cluster, boxes, lines, stages;
    long long* clocks;  // (blocks), of each block's copies
    int* failed;        // set to 1 if a wait was given up
};
// Returns the launch's error, or cudaErrorInvalidValue for sizes that do not fit.
cudaError_t copy_boxes(const Copies& p, cudaStream_t stream);

// Every block multiplies 128 lines by `columns` lines of 128 bytes over and over, from shared memory. copy_lines: lines of
// boxes that another warp copies into a ring meanwhile, or 0.
struct Products {
    const void* operands;  // (128 + columns) lines of 128 bytes, as they lie in shared memory
    const void* source;    // of copies, `region` lines
    int64_t region;
    int blocks, columns, steps, copy_lines;
    float* sums;        // (blocks, 256): something of every thread's sums
    long long* clocks;  // (blocks), of the products
    int* boxes;         // (blocks), that were copied
    int* failed;
};
cudaError_t multiply(const Products& p, Operand operand, cudaStream_t stream);

// Block i multiplies 64 of the `lines` lines of `left` (int8) by the 64 lines of `right`: groups of 8 lines that follow
// each other, the first group from line starts[i] on, groups aparts[i] lines apart, with base offset offsets[i] in the
// matrix descriptor. sums (cases, 64, 64).
struct Tiles {
    const int8_t *left, *right;
    int cases, lines;
    const int *starts, *aparts, *offsets;
    int32_t* sums;
};
cudaError_t multiply_tiles(const Tiles& p, cudaStream_t stream);

// `count` kernels one after the other, each of `blocks` blocks that read `bytes` each, of `weights`, before they wait for
// the kernel before them, and then add 1 to numbers[block] if `adds`. dependent: programmatic dependent launch.
struct Launches {
    const void* weights;
    int64_t bytes;
    int count, blocks;
    bool adds, dependent;
    int* numbers;
};
cudaError_t launch_many(const Launches& p, cudaStream_t stream);

}  // namespace vpd::probes
