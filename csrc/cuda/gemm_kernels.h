// Kernels of the GEMM for its host code. Kernels of each kind of instruction are compiled in a file of their own.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/hopper.cuh"

namespace vpd::gemm {

inline int bytes_of(CudaOperand operand) {
    return operand == CudaOperand::int8 || operand == CudaOperand::float8_e4m3fn ? 1 : 2;
}

// A tile has 64 or 128 rows and as many columns. Not for float8_e4m3fn.
cudaError_t launch_mma(const CudaGemm& problem, const Plan& plan, CudaOperand operand, cudaStream_t stream);

constexpr int WGMMA_ROWS = 128;  // of a tile; it has 64, 128 or, by the wide kernel, 160 columns

constexpr int MAX_CLUSTER = 8;  // blocks that add their sums in a cluster

// Blocks that share a multiprocessor, as far as registers allow; sums of float8 are kept twice.
constexpr int blocks_per_processor(int columns, bool float8) {
    return columns > 128 || (float8 && columns == 128) ? 1 : 2;
}

// Why TMA cannot read the sources or the weight in the boxes of the plan, or nullptr.
const char* wgmma_refuses(const CudaGemm& problem, const Plan& plan, CudaOperand operand);
cudaError_t launch_wgmma(const CudaGemm& problem, const Plan& plan, CudaOperand operand, cudaStream_t stream);

// Of the sources and the weight. cluster: blocks that load a part of the weight's box each.
struct TensorMaps {
    TensorMap source[2], weight;
};
bool encode_operands(TensorMaps& maps, const CudaGemm& problem, const Plan& plan, CudaOperand operand, int cluster);

constexpr int STORED_ROWS = 64;  // that a warpgroup of a persistent kernel stores at a time

// By blocks that stay, in tiles of 256x128, 256x160 or 128x256; for usual problems only.
bool persistent_takes(const CudaGemm& problem, const Plan& plan, CudaOperand operand);
cudaError_t launch_persistent(const CudaGemm& problem, const Plan& plan, CudaOperand operand, cudaStream_t stream);

}  // namespace vpd::gemm
