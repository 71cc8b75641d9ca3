// Launches the GEMM kernels with wgmma, and describes the tensor maps that they read through.
#include "cuda/gemm_wgmma.cuh"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/gemm_kernels.h"
#include "cuda/tensor_map.h"

namespace vpd::gemm {
namespace {

constexpr int64_t MAX_STRIDE_BYTES = int64_t(1) << 40;
constexpr int MAX_BOX = 256, MAX_TRAVERSAL_STRIDE = 8;

int images_of_box(const Plan& plan) { return plan.rows_of_tile >> (plan.log_x + plan.log_y); }

bool encode_source(TensorMap& map, const CudaGemm& p, const Plan& plan, int bytes, int i) {
    const CudaPositions& x = p.source[i];
    const cuuint64_t sizes[] = {cuuint64_t(p.channels[i]), cuuint64_t(p.width), cuuint64_t(p.height),
                                cuuint64_t(p.batch)};
    cuuint64_t strides[] = {cuuint64_t(x.column) * bytes, cuuint64_t(x.row) * bytes, cuuint64_t(x.image) * bytes};
    for (int axis = 0; axis < 3; ++axis)  // of what there is only one, the stride does not matter
        if (sizes[axis + 1] == 1) strides[axis] = cuuint64_t(p.channels[i]) * bytes;
    const cuuint32_t stride = cuuint32_t(p.stride);
    const cuuint32_t box[] = {cuuint32_t(STEP_BYTES / bytes), stride << plan.log_x, stride << plan.log_y,
                              cuuint32_t(images_of_box(plan))};
    const cuuint32_t steps[] = {1, stride, stride, 1};
    return encode_tensor_map(map, bytes, 4, x.data, sizes, strides, box, steps);
}

bool encode_weight(TensorMap& map, const CudaGemm& p, const Plan& plan, int bytes, int cluster) {
    const cuuint64_t sizes[] = {cuuint64_t(plan.weight_columns), cuuint64_t(p.n)};
    const cuuint64_t strides[] = {cuuint64_t(plan.weight_columns) * bytes};
    const cuuint32_t box[] = {cuuint32_t(STEP_BYTES / bytes), cuuint32_t(plan.columns_of_tile / cluster)},
                     steps[] = {1, 1};
    return encode_tensor_map(map, bytes, 2, p.weight, sizes, strides, box, steps);
}

template <typename T, int COLUMNS, bool WIDE>
cudaError_t launch(const TensorMaps& maps, const CudaGemm& p, const Plan& plan, cudaStream_t stream) {
    using Size = WgmmaTile<T, COLUMNS>;
    const int cluster = 1 << plan.log_cluster, blocks = plan.row_tiles * plan.column_tiles * plan.splits * cluster;
    return launch_kernel(wgmma_kernel<T, COLUMNS, WIDE>, blocks, Size::THREADS,
                         WIDE ? Size::WIDE_BYTES : Size::SHARED_BYTES, cluster, stream, maps, p, plan);
}

template <typename T>
cudaError_t launch_of(const TensorMaps& maps, const CudaGemm& p, const Plan& plan, cudaStream_t stream) {
    switch (plan.columns_of_tile) {
        case 64:
            return plan.wide ? launch<T, 64, true>(maps, p, plan, stream) : launch<T, 64, false>(maps, p, plan, stream);
        case 128:
            return plan.wide ? launch<T, 128, true>(maps, p, plan, stream)
                             : launch<T, 128, false>(maps, p, plan, stream);
    }
    if constexpr (!std::is_same_v<T, Float8>)
        if (plan.columns_of_tile == 160) return launch<T, 160, true>(maps, p, plan, stream);
    return cudaErrorInvalidValue;
}

}  // namespace

const char* wgmma_refuses(const CudaGemm& p, const Plan& plan, CudaOperand operand) {
    const int bytes = bytes_of(operand);
    if (p.stride > MAX_TRAVERSAL_STRIDE || p.stride << std::max(plan.log_x, plan.log_y) > MAX_BOX)
        return "the stride of the convolution is too large for TMA";
    const int64_t sizes[] = {p.batch, p.height, p.width};
    for (int i = 0; i < 2; ++i) {
        const int64_t strides[] = {p.source[i].image, p.source[i].row, p.source[i].column};
        for (int axis = 0; p.channels[i] && axis < 3; ++axis)
            if (sizes[axis] > 1 && (strides[axis] < 1 || strides[axis] * bytes >= MAX_STRIDE_BYTES))
                return "positions of a source that share memory, or lie too far apart, cannot be read by TMA";
    }
    return nullptr;
}

bool encode_operands(TensorMaps& maps, const CudaGemm& p, const Plan& plan, CudaOperand operand, int cluster) {
    const int bytes = bytes_of(operand);
    return encode_source(maps.source[0], p, plan, bytes, 0) &&
           (!p.channels[1] || encode_source(maps.source[1], p, plan, bytes, 1)) &&
           encode_weight(maps.weight, p, plan, bytes, cluster);
}

cudaError_t launch_wgmma(const CudaGemm& p, const Plan& plan, CudaOperand operand, cudaStream_t stream) {
    TensorMaps maps{};
    if (!encode_operands(maps, p, plan, operand, 1)) return cudaErrorInvalidValue;
    switch (operand) {
        case CudaOperand::int8: return launch_of<int8_t>(maps, p, plan, stream);
        case CudaOperand::float8_e4m3fn: return launch_of<Float8>(maps, p, plan, stream);
        case CudaOperand::bfloat16: return launch_of<Bfloat16>(maps, p, plan, stream);
        case CudaOperand::float16: return launch_of<Float16>(maps, p, plan, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace vpd::gemm
