// The transforms of Winograd's minimal filtering in one dimension, and what its 8-bit rows need.
#pragma once

#include "cpu/simd.h"

namespace vpd::VPD_ISA {
namespace {

// Each takes IN neighbouring inputs, of which the next tile's are STEP further, to TAPS factors, and TAPS products to
// OUT outputs. The weight's part of the transform is winograd_weight in vpd_fast/ops.

// F(2,3): points 0, 1, -1 and infinity.
struct TwoOutputs {
    static constexpr int STEP = 2, IN = 4, TAPS = 4, OUT = 2;
    VPD_INLINE void input(const F16* d, F16* t) {
        t[0] = subtract(d[0], d[2]), t[1] = add(d[1], d[2]);
        t[2] = subtract(d[2], d[1]), t[3] = subtract(d[1], d[3]);
    }
    VPD_INLINE void output(const F16* m, F16* y) {
        y[0] = add(m[0], add(m[1], m[2]));
        y[1] = subtract(subtract(m[1], m[2]), m[3]);
    }
};

// F(2,3) of inputs that are doubled: for (a, b, b, c) the third of the four factors is zero. The second is b instead of
// 2 b; the weight has the 2.
struct TwoOfDoubled {
    static constexpr int STEP = 1, IN = 3, TAPS = 3, OUT = 2;
    VPD_INLINE void input(const F16* d, F16* t) {
        t[0] = subtract(d[0], d[1]), t[1] = d[1], t[2] = subtract(d[1], d[2]);
    }
    VPD_INLINE void output(const F16* m, F16* y) { y[0] = add(m[0], m[1]), y[1] = subtract(m[1], m[2]); }
};

// F(4,3): points 0, 1, -1, 2, -2 and infinity.
struct FourOutputs {
    static constexpr int STEP = 4, IN = 6, TAPS = 6, OUT = 4;
    VPD_INLINE void input(const F16* d, F16* t) {
        const F16 two = broadcast(2.0f), four = broadcast(4.0f), minus_four = broadcast(-4.0f);
        const F16 minus_five = broadcast(-5.0f);
        const F16 even = multiply_add(minus_four, d[2], d[4]), odd = multiply_add(minus_four, d[1], d[3]);
        const F16 wide_even = subtract(d[4], d[2]), wide_odd = multiply(two, subtract(d[3], d[1]));
        t[0] = multiply_add(four, d[0], multiply_add(minus_five, d[2], d[4]));
        t[1] = add(even, odd), t[2] = subtract(even, odd);
        t[3] = add(wide_even, wide_odd), t[4] = subtract(wide_even, wide_odd);
        t[5] = multiply_add(four, d[1], multiply_add(minus_five, d[3], d[5]));
    }
    VPD_INLINE void output(const F16* m, F16* y) {
        const F16 sum = add(m[1], m[2]), difference = subtract(m[1], m[2]);
        const F16 wide_sum = add(m[3], m[4]), wide_difference = subtract(m[3], m[4]);
        y[0] = add(m[0], add(sum, wide_sum));
        y[1] = multiply_add(broadcast(2.0f), wide_difference, difference);
        y[2] = multiply_add(broadcast(4.0f), wide_sum, sum);
        y[3] = add(m[5], multiply_add(broadcast(8.0f), wide_difference, difference));
    }
};

// --- 8-bit rows ------------------------------------------------------------------------------------------------------

typedef int32_t Int32s __attribute__((vector_size(64)));

// max(|a|, most), of which NaN is the largest: the bits of numbers that are not negative are ordered as the numbers are.
VPD_INLINE F16 larger_magnitude(F16 a, F16 most) {
#if defined(__AVX512F__)
    const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(a));
    return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_castps_si512(most)));
#else
    Int32s x, y;
    __builtin_memcpy(&x, &a, sizeof x);
    __builtin_memcpy(&y, &most, sizeof y);
    x &= 0x7fffffff;
    x = x > y ? x : y;
    __builtin_memcpy(&a, &x, sizeof a);
    return a;
#endif
}

// a - b of int32 lanes.
VPD_INLINE F16 subtract_int32(F16 a, const int32_t* b) {
    Int32s x, y;
    __builtin_memcpy(&x, &a, sizeof x);
    __builtin_memcpy(&y, b, sizeof y);
    x -= y;
    __builtin_memcpy(&a, &x, sizeof a);
    return a;
}

// Lane i is the largest of the 16 numbers of vector i.
VPD_INLINE F16 largest_of_each(const F16* vectors) {
    float rows[LANES * LANES], columns[LANES * LANES];
    for (int i = 0; i < LANES; ++i) store(rows + i * LANES, vectors[i]);
    for (int r = 0; r < LANES; r += 4)
        for (int c = 0; c < LANES; c += 4) transpose_4x4(rows + r * LANES + c, LANES, columns + c * LANES + r, LANES);
    F16 most = load(columns);
    for (int i = 1; i < LANES; ++i) most = larger_magnitude(load(columns + i * LANES), most);
    return most;
}

}  // namespace
}  // namespace vpd::VPD_ISA
