// The kernels of a product, for its host code: each file with a number of them is compiled alone.
#pragma once

#include "cuda/product_tile.cuh"

namespace vpd::product {

// A tile has 64 or 128 rows and as many columns. Not for float8_e4m3fn.
cudaError_t launch_mma(const CudaProduct& problem, const Plan& plan, CudaFactor factor, cudaStream_t stream);

constexpr int WGMMA_ROWS = 128;  // of a tile; it has 64 or 128 columns

// Why TMA cannot read the sources or the weight in the boxes of the plan, or nullptr.
const char* wgmma_refuses(const CudaProduct& problem, const Plan& plan, CudaFactor factor);
cudaError_t launch_wgmma(const CudaProduct& problem, const Plan& plan, CudaFactor factor, cudaStream_t stream);

}  // namespace vpd::product
