// The GEMM of `linear` and `conv2d` with its epilogue: rows times a weight, and what follows.
//
//     out = activation(scaled(rows weight^T) + bias) + residual
//
// A row is what one output position reads of NHWC images: for `linear` the position itself, for `conv2d` its
// neighbourhood, zero outside of the image, for each tap first the channels of one source, then those of the other.
// Products of 8 or 16 bits on tensor cores, everything else in float32. Bitwise repeatable.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace vpd {

enum class CudaOperand { int8, float8_e4m3fn, bfloat16, float16 };  // dtype of both operands
enum class CudaActivation { none, relu, silu, geglu };

// Positions (image, row, column) of a tensor whose channels are next to each other; strides in elements.
struct CudaPositions {
    void* data;
    int64_t image, row, column;
};

struct CudaGemm {
    int64_t batch, height, width, out_height, out_width;
    int64_t kernel_height, kernel_width, stride, top, left;
    CudaPositions source[2];  // (batch, height, width, channels); read only
    int64_t channels[2];      // the second is 0 if there is one source
    const void* weight;       // (n, kernel_height * kernel_width * channels of both sources), contiguous
    int64_t n;
    // Of 8 bits, else null: rows ~ row_scales * (stored - row_zeros) and weight ~ column_scales * stored, with
    // weight_sums (n) of the stored weight. Zeros and weight sums are for int8 only. One scale for every output position, or for every
    // image if no position reads outside of it. Rows of int8 may have none: they are then multiplied as they are.
    const float *row_scales, *row_zeros, *column_scales, *weight_sums;
    bool scale_per_image;
    const float* bias;  // (n) or null
    // geglu: runs of 16 values and of their 16 gates take turns among the n columns, and n / 2 columns come out.
    CudaActivation activation;
    CudaPositions residual, out;  // (batch, out_height, out_width, n or n / 2); residual null: none
    CudaFloat residual_dtype, out_dtype;
    // (columns of the result) or null: stored is then int8, round(result * round_factors + round_shifts) to nearest, ties
    // to even, within -128 ... 127, NaN as -128; out_dtype does not matter.
    const float *round_factors, *round_shifts;
    void* scratch;  // of gemm_cuda_scratch() bytes; null if that is 0
    // Of the result as it is stored, (batch, positions / run, 5, columns), those of images `statistics_image` apart: of
    // each column in runs of `run` output positions. Filled where gemm_cuda_finds_statistics(); null: not asked for.
    float* statistics;
    int64_t statistics_image, run;
};

// Which matrix instructions compute a product.
enum class CudaInstructions {
    automatic,   // wgmma if it can, else mma
    mma,         // mma.sync, from sm_80 on; not float8_e4m3fn
    wgmma,       // wgmma and TMA, sm_90 only
    wgmma_wide,  // the same, with other copies, tiles up to 160 columns, and eight columns per thread of usual results
    wgmma_persistent,  // blocks that stay, in clusters, where there are tiles for all of them; else as wgmma_wide
    wgmma_cluster      // the same, but blocks that share a sum are a cluster and add it in shared memory
};

// nullptr if the product can run on the current device, else the reason why it cannot; scratch does not matter.
const char* gemm_cuda_refuses(const CudaGemm& problem, CudaOperand operand, CudaInstructions instructions);

// Bytes of scratch that a problem needs on the current device.
int64_t gemm_cuda_scratch(const CudaGemm& problem, CudaOperand operand, CudaInstructions instructions);

// Whether a product that is not refused fills the statistics that it is asked for.
bool gemm_cuda_finds_statistics(const CudaGemm& problem, CudaOperand operand, CudaInstructions instructions);

// Enqueues on the stream of the current device; returns the launch's error, or cudaErrorInvalidValue if the product is
// refused or lacks scratch.
cudaError_t gemm_cuda(const CudaGemm& problem, CudaOperand operand, CudaInstructions instructions, cudaStream_t stream);

}  // namespace vpd
