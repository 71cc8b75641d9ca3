// Launches the GEMM kernels with mma.sync.
#include "cuda/gemm_mma.cuh"

#include "cuda/device.h"
#include "cuda/gemm_kernels.h"

namespace vpd::gemm {
namespace {

template <typename T, int SIDE>
cudaError_t launch(const CudaGemm& p, const Plan& plan, cudaStream_t stream) {
    using Size = MmaTile<SIDE>;
    return launch_kernel(mma_kernel<T, SIDE>, plan.row_tiles * plan.column_tiles * plan.splits, Size::THREADS,
                         Size::SHARED_BYTES, 1, stream, p, plan);
}

template <typename T>
cudaError_t launch_of(const CudaGemm& p, const Plan& plan, cudaStream_t stream) {
    return plan.rows_of_tile == 128 ? launch<T, 128>(p, plan, stream) : launch<T, 64>(p, plan, stream);
}

}  // namespace

cudaError_t launch_mma(const CudaGemm& p, const Plan& plan, CudaOperand operand, cudaStream_t stream) {
    switch (operand) {
        case CudaOperand::int8: return launch_of<int8_t>(p, plan, stream);
        case CudaOperand::bfloat16: return launch_of<Bfloat16>(p, plan, stream);
        case CudaOperand::float16: return launch_of<Float16>(p, plan, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace vpd::gemm
