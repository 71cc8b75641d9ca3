// Tensor maps, through which TMA reads: encoded by the driver, which is not linked so that modules can be imported without
// one.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace vpd {

using EncodeTensorMap = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// cuTensorMapEncodeTiled, or null where the driver has none.
inline EncodeTensorMap* find_encode_tensor_map() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTensorMap*>(function)
                                                                         : nullptr;
}

// Boxes of 64 or 128 bytes along the first dimension, swizzled, of numbers of 1 or 2 bytes. strides: in bytes, of all dimensions
// but the first. Returns whether there is such a map.
inline bool encode_tensor_map(CUtensorMap& map, int bytes, int rank, const void* address, const cuuint64_t* sizes,
                              const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps) {
    static EncodeTensorMap* const function = find_encode_tensor_map();
    const auto type = bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const auto swizzle = box[0] * bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
    return function && function(&map, type, rank, const_cast<void*>(address), sizes, strides, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace vpd
