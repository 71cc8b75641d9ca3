// Plans and launches of convolutions that read few numbers per position.
#include "cuda/gemm_narrow.h"

#include "cuda/gemm_narrow.cuh"
#include "sizes.h"

namespace vpd {
namespace narrow {
namespace {

constexpr int64_t BLOCKS_PER_PROCESSOR = 16;  // that are wanted: some rounds of those that run together
constexpr int64_t MAX_POSITIONS = int64_t(1) << 30, MAX_REACH = int64_t(1) << 31;

int64_t columns_of(const CudaGemm& p) { return p.kernel_height * p.kernel_width * p.channels[0]; }

NarrowPlan plan_of(const CudaGemm& p) {
    NarrowPlan plan;
    plan.positions = int(p.out_height * p.out_width);
    plan.tiles = int(ceil_divide(plan.positions, TILE));
    plan.across = int(ceil_divide(p.n, COLUMNS));
    plan.columns = int(columns_of(p));
    plan.tiles_of_run = gemm_narrow_cuda_finds_statistics(p) ? int(p.run / TILE) : 0;
    const int64_t wanted = BLOCKS_PER_PROCESSOR * device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t together = plan.tiles_of_run ? plan.tiles_of_run : 1;
    const int64_t chunk = ceil_divide(p.batch * plan.tiles * plan.across, wanted);
    plan.chunk = int(smaller(ceil_divide(chunk, together) * together, plan.tiles));
    plan.chunks = int(ceil_divide(plan.tiles, plan.chunk));
    return plan;
}

template <typename T, typename Number, int STEPS>
cudaError_t launch(const CudaGemm& p, CudaFloat dtype, const NarrowPlan& plan, cudaStream_t stream) {
    return launch_kernel(narrow_kernel<T, Number, STEPS>, p.batch * plan.chunks * plan.across, THREADS,
                         int(sizeof(NarrowShared<STEPS>)), 1, stream, p, dtype, plan);
}

template <typename T, typename Number>
cudaError_t launch_steps(const CudaGemm& p, CudaFloat dtype, const NarrowPlan& plan, cudaStream_t stream) {
    const int64_t steps = ceil_divide(plan.columns, FRAGMENT);
    return steps <= 2   ? launch<T, Number, 2>(p, dtype, plan, stream)
           : steps == 3 ? launch<T, Number, 3>(p, dtype, plan, stream)
                        : launch<T, Number, MAX_STEPS>(p, dtype, plan, stream);
}

template <typename T>
cudaError_t launch_of(const CudaGemm& p, CudaFloat dtype, cudaStream_t stream) {
    const NarrowPlan plan = plan_of(p);
    return p.out_dtype == CudaFloat::float32 ? launch_steps<T, float>(p, dtype, plan, stream)
                                             : launch_steps<T, T>(p, dtype, plan, stream);
}

bool aligned(const CudaPositions& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.image % 8 == 0 && x.row % 8 == 0 && x.column % 8 == 0;
}

}  // namespace
}  // namespace narrow

const char* gemm_narrow_cuda_refuses(const CudaGemm& p, CudaOperand operand) {
    const bool bfloat16 = operand == CudaOperand::bfloat16;
    if (!bfloat16 && operand != CudaOperand::float16) return "the weight is not of 16 bits";
    if (p.channels[1]) return "there are two sources";
    if (p.round_factors) return "the result is to be rounded to int8";
    if (narrow::columns_of(p) > narrow::MAX_STEPS * narrow::FRAGMENT) return "a position reads more than 64 numbers";
    if (p.n % 8) return "columns of the result are not a multiple of 8";
    if (p.activation != CudaActivation::none && p.activation != CudaActivation::relu)
        return "the activation is not relu";
    const CudaFloat same = bfloat16 ? CudaFloat::bfloat16 : CudaFloat::float16;
    if (p.out_dtype != CudaFloat::float32 && p.out_dtype != same)
        return "the result is neither float32 nor as the weight";
    if (p.residual.data && p.residual_dtype != p.out_dtype) return "the residual is not of the result's type";
    if (!narrow::aligned(p.out) || (p.residual.data && !narrow::aligned(p.residual)))
        return "result or residual are not aligned to 16 bytes";
    if (p.batch * p.out_height * p.out_width >= narrow::MAX_POSITIONS ||
        p.height * p.source[0].row >= narrow::MAX_REACH)
        return "there are too many positions";
    return nullptr;
}

bool gemm_narrow_cuda_finds_statistics(const CudaGemm& p) {
    return p.statistics && p.run % narrow::TILE == 0 && p.out_height * p.out_width % p.run == 0;
}

cudaError_t gemm_narrow_cuda(const CudaGemm& p, CudaFloat source_dtype, CudaOperand operand, cudaStream_t stream) {
    if (gemm_narrow_cuda_refuses(p, operand)) return cudaErrorInvalidValue;
    if (!(p.batch * p.out_height * p.out_width * p.n)) return cudaSuccess;
    return operand == CudaOperand::bfloat16 ? narrow::launch_of<device::Bfloat16>(p, source_dtype, stream)
                                            : narrow::launch_of<device::Float16>(p, source_dtype, stream);
}

}  // namespace vpd
