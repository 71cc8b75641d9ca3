// Element types of tensors that CUDA operators take; queries of the current device and launches on it, for host code.
#pragma once

#include <cuda_runtime_api.h>

namespace vpd {

enum class CudaFloat { float32, bfloat16, float16 };

// 0 if there is no device.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// Enqueues a kernel on blocks of `threads` threads with dynamic shared memory, in clusters of blocks.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, int cluster,
                          cudaStream_t stream, const Arguments&... arguments) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace vpd
