// Launches the persistent GEMM kernels.
#include "cuda/gemm_persistent.cuh"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/gemm_kernels.h"
#include "cuda/tensor_map.h"

namespace vpd::gemm {
namespace {

constexpr int64_t MAX_STRIDE_BYTES = int64_t(1) << 40;

// Returns whether TMA stores, or loads, bfloat16 there, in boxes of 16 bytes and more.
bool takes(const CudaPositions& x, const CudaGemm& p) {
    const int64_t sizes[] = {p.batch, p.out_height, p.out_width}, strides[] = {x.image, x.row, x.column};
    for (int axis = 0; axis < 3; ++axis)
        if (sizes[axis] > 1 && (strides[axis] < 1 || strides[axis] % 8 || strides[axis] * 2 >= MAX_STRIDE_BYTES))
            return false;
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Boxes of the 64 positions of a subtile and of some columns of a result or residual.
bool encode_result(TensorMap& map, const CudaPositions& x, const CudaGemm& p, const Plan& plan) {
    const cuuint64_t sizes[] = {cuuint64_t(plan.out_columns), cuuint64_t(p.out_width), cuuint64_t(p.out_height),
                                cuuint64_t(p.batch)};
    cuuint64_t strides[] = {cuuint64_t(x.column) * 2, cuuint64_t(x.row) * 2, cuuint64_t(x.image) * 2};
    for (int axis = 0; axis < 3; ++axis)  // of what there is only one, the stride does not matter
        if (sizes[axis + 1] == 1) strides[axis] = cuuint64_t(plan.out_columns) * 2;
    const int across = std::min(STORED_ROWS, 1 << plan.log_x), down = std::min(STORED_ROWS / across, 1 << plan.log_y);
    const cuuint32_t box[] = {cuuint32_t(stored_columns(plan.columns_of_tile)), cuuint32_t(across), cuuint32_t(down),
                              cuuint32_t(STORED_ROWS / across / down)};
    const cuuint32_t steps[] = {1, 1, 1, 1};
    return encode_tensor_map(map, 2, 4, x.data, sizes, strides, box, steps);
}

template <typename T, int ROWS, int COLUMNS>
cudaError_t launch(const PersistentMaps& maps, const CudaGemm& p, const Plan& plan, cudaStream_t stream) {
    using Size = PersistentTile<ROWS, COLUMNS>;
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount) / CLUSTER * CLUSTER;
    const int blocks = std::min(std::max(CLUSTER, processors), plan.row_tiles * plan.column_tiles);
    return launch_kernel(persistent_kernel<T, ROWS, COLUMNS>, blocks, Size::THREADS, Size::SHARED_BYTES, CLUSTER,
                         stream, maps, p, plan);
}

template <typename T>
cudaError_t launch_of(const PersistentMaps& maps, const CudaGemm& p, const Plan& plan, cudaStream_t stream) {
    switch (plan.columns_of_tile) {
        case 128: return launch<T, 256, 128>(maps, p, plan, stream);
        case 160: return launch<T, 256, 160>(maps, p, plan, stream);
        case 256: return launch<T, 128, 256>(maps, p, plan, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

bool persistent_takes(const CudaGemm& p, const Plan& plan, CudaOperand operand) {
    const bool geglu = p.activation == CudaActivation::geglu;
    return (operand == CudaOperand::int8 || operand == CudaOperand::bfloat16) && p.out_dtype == CudaFloat::bfloat16 &&
           !p.round_factors && plan.out_columns % 8 == 0 && takes(p.out, p) && p.activation != CudaActivation::silu &&
           !(geglu && (p.residual.data || plan.columns_of_tile == 160)) &&
           (!p.residual.data || (p.residual_dtype == CudaFloat::bfloat16 && takes(p.residual, p)));
}

cudaError_t launch_persistent(const CudaGemm& p, const Plan& plan, CudaOperand operand, cudaStream_t stream) {
    PersistentMaps maps{};
    if (!encode_operands(maps.operands, p, plan, operand, CLUSTER) || !encode_result(maps.out, p.out, p, plan) ||
        (p.residual.data && !encode_result(maps.residual, p.residual, p, plan)))
        return cudaErrorInvalidValue;
    if (operand == CudaOperand::int8) return launch_of<int8_t>(maps, p, plan, stream);
    return launch_of<Bfloat16>(maps, p, plan, stream);
}

}  // namespace vpd::gemm
