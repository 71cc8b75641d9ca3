// The GEMM of convolutions that read few numbers per position, such as those of images of three channels, straight from
// the image: its taps are no whole 16 bytes, which the other kernels copy.
#pragma once

#include "cuda/gemm.h"

namespace vpd {

// nullptr if the product can be computed, else the reason why not. The problem is as in gemm.h, but its source, one, is of
// its own type and rounded to the operand's, 16 bits.
const char* gemm_narrow_cuda_refuses(const CudaGemm& problem, CudaOperand operand);

// Whether a product that is not refused fills the statistics that it is asked for.
bool gemm_narrow_cuda_finds_statistics(const CudaGemm& problem);

// Enqueues on the stream of the current device; returns the launch's error, or cudaErrorInvalidValue if it is refused.
cudaError_t gemm_narrow_cuda(const CudaGemm& problem, CudaFloat source_dtype, CudaOperand operand, cudaStream_t stream);

}  // namespace vpd
