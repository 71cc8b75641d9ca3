// Reductions over the four threads that share a row of an accumulator of the matrix instructions.
#pragma once

#include "cuda/primitives.cuh"

namespace vpd::device {

__device__ inline float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

__device__ inline float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

}  // namespace vpd::device
