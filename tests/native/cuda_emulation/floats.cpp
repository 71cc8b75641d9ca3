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

// The bits of a number >= 0 with that many bits of fraction, whose smallest normal number is 2^least; not rounded to
// what lies beyond the largest.
uint32_t bits_of_magnitude(float size, int fraction, int least) {
    // Adding and subtracting a power of two rounds to the spacing of numbers of this size, ties to even.
    const int exponent = size < std::ldexp(1.0f, least) ? least : std::ilogb(size);
    const float shift = std::ldexp(1.5f, exponent - fraction + 23);
    volatile float shifted = size + shift;
    const float rounded = shifted - shift;
    if (rounded < std::ldexp(1.0f, least)) return uint32_t(std::ldexp(rounded, fraction - least));
    const int final_exponent = std::ilogb(rounded);
    const uint32_t tail = uint32_t(std::ldexp(rounded, fraction - final_exponent)) & ((1u << fraction) - 1);
    return uint32_t(final_exponent - least + 1) << fraction | tail;
}

uint16_t float_to_float16(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    const float size = std::fabs(x);
    return sign | (size >= 65520.0f ? 0x7c00 : bits_of_magnitude(size, 10, -14));
}

uint8_t float_to_float8(float x) {
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return 0x7f;
    const float size = std::fabs(x);
    return sign | (size >= 448.0f ? 0x7e : bits_of_magnitude(size, 3, -6));
}

}  // namespace cuda_emulation
