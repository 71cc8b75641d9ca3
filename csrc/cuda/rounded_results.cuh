// Results that become int8 by factors and shifts of their columns.
#pragma once

#include "cuda/primitives.cuh"

namespace vpd::device {

// A number of a result as int8, in the low byte: to nearest, ties to even, within -128 ... 127; NaN is -128.
__device__ inline uint32_t rounded_to_int8(float x, float factor, float shift) {
    const float number = fminf(fmaxf(multiply_rounded(x, factor) + shift, -128.0f), 127.0f);
    return bits_of(number + 12582912.0f) & 0xff;  // 1.5 * 2^23
}

}  // namespace vpd::device
