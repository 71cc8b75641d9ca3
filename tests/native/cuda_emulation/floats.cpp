// The 16- and 8-bit float formats of cuda_emulation.h; rounding is to the nearest, ties to even.
#include "cuda_emulation.h"

namespace cuda_emulation {

float bfloat16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

uint16_t float_to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    if (std::isnan(x)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float16_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x = exponent ? std::ldexp(float(fraction + 1024), exponent - 25) : std::ldexp(float(fraction), -24);
    if (exponent == 31) x = fraction ? NAN : INFINITY;
    return bits >> 15 ? -x : x;
}

uint16_t float_to_float16(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    const float size = std::fabs(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    // Adding and subtracting a power of two rounds to the spacing of float16 values of this size, ties to even.
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const float shift = std::ldexp(1.5f, exponent - 10 + 23);
    volatile float shifted = size + shift;
    const float rounded = shifted - shift;
    if (rounded < 0x1p-14f) return sign | uint16_t(std::ldexp(rounded, 24));
    const int final_exponent = std::ilogb(rounded);
    return sign | uint16_t((final_exponent + 15) << 10 | (int(std::ldexp(rounded, 10 - final_exponent)) & 1023));
}

uint8_t float_to_float8(float x) {
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return 0x7f;
    const float size = std::fabs(x);
    if (size >= 448.0f) return sign | 0x7e;
    const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
    const float shift = std::ldexp(1.5f, exponent - 3 + 23);
    volatile float shifted = size + shift;
    const float rounded = shifted - shift;
    if (rounded < 0x1p-6f) return sign | uint8_t(std::ldexp(rounded, 9));
    const int final_exponent = std::ilogb(rounded);
    return sign | uint8_t((final_exponent + 7) << 3 | (int(std::ldexp(rounded, 3 - final_exponent)) & 7));
}

}  // namespace cuda_emulation
