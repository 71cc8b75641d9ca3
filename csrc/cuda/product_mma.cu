// Kernels of products with mma.sync.
#include "cuda/product_mma.cuh"

#include "cuda/product_kernels.h"

namespace vpd::product {
namespace {

template <typename T, int SIDE>
cudaError_t launch(const CudaProduct& p, const Plan& plan, cudaStream_t stream) {
    constexpr int BYTES = MmaTile<SIDE>::SHARED_BYTES;
    const auto kernel = mma_kernel<T, SIDE>;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (status != cudaSuccess) return status;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(plan.row_tiles * plan.column_tiles * plan.splits));
    config.blockDim = dim3(MmaTile<SIDE>::THREADS), config.dynamicSmemBytes = BYTES, config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, p, plan);
}

template <typename T>
cudaError_t launch_of(const CudaProduct& p, const Plan& plan, cudaStream_t stream) {
    return plan.rows_of_tile == 128 ? launch<T, 128>(p, plan, stream) : launch<T, 64>(p, plan, stream);
}

}  // namespace

cudaError_t launch_mma(const CudaProduct& p, const Plan& plan, CudaFactor factor, cudaStream_t stream) {
    switch (factor) {
        case CudaFactor::int8: return launch_of<int8_t>(p, plan, stream);
        case CudaFactor::bfloat16: return launch_of<Bfloat16>(p, plan, stream);
        case CudaFactor::float16: return launch_of<Float16>(p, plan, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace vpd::product
