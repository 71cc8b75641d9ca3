// What host code asks the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace vpd {

// 0 if there is no device.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

}  // namespace vpd
