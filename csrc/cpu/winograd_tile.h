// The transforms of Winograd's minimal filtering in one dimension, and the rounding of its 8-bit rows.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/matrix_tile.h"
#include "cpu/winograd_conv2d.h"

namespace vpd::VPD_ISA {
namespace {

// Each evaluates IN neighbouring inputs, of which the next tile's are STEP further, at POINTS points, and interpolates OUT
// outputs from the products at these points. The weight's part of the transform is winograd_weight in vpd_fast/ops.

// F(2,3): points 0, 1, -1 and infinity.
struct TwoOutputs {
    static constexpr int STEP = 2, IN = 4, POINTS = 4, OUT = 2;
    VPD_INLINE void input(const f32x16* d, f32x16* t) {
        t[0] = subtract(d[0], d[2]), t[1] = add(d[1], d[2]);
        t[2] = subtract(d[2], d[1]), t[3] = subtract(d[1], d[3]);
    }
    VPD_INLINE void output(const f32x16* m, f32x16* y) {
        y[0] = add(m[0], add(m[1], m[2]));
        y[1] = subtract(subtract(m[1], m[2]), m[3]);
    }
};

// F(2,3) of inputs that are doubled: for (a, b, b, c) the third of the four values is zero. The second is b instead of
// 2 b; the weight has the 2.
struct TwoOutputsOfDoubled {
    static constexpr int STEP = 1, IN = 3, POINTS = 3, OUT = 2;
    VPD_INLINE void input(const f32x16* d, f32x16* t) {
        t[0] = subtract(d[0], d[1]), t[1] = d[1], t[2] = subtract(d[1], d[2]);
    }
    VPD_INLINE void output(const f32x16* m, f32x16* y) { y[0] = add(m[0], m[1]), y[1] = subtract(m[1], m[2]); }
};

// F(4,3): points 0, 1, -1, 2, -2 and infinity.
struct FourOutputs {
    static constexpr int STEP = 4, IN = 6, POINTS = 6, OUT = 4;
    VPD_INLINE void input(const f32x16* d, f32x16* t) {
        const f32x16 two = broadcast(2.0f), four = broadcast(4.0f), minus_four = broadcast(-4.0f);
        const f32x16 minus_five = broadcast(-5.0f);
        const f32x16 even = multiply_add(minus_four, d[2], d[4]), odd = multiply_add(minus_four, d[1], d[3]);
        const f32x16 wide_even = subtract(d[4], d[2]), wide_odd = multiply(two, subtract(d[3], d[1]));
        t[0] = multiply_add(four, d[0], multiply_add(minus_five, d[2], d[4]));
        t[1] = add(even, odd), t[2] = subtract(even, odd);
        t[3] = add(wide_even, wide_odd), t[4] = subtract(wide_even, wide_odd);
        t[5] = multiply_add(four, d[1], multiply_add(minus_five, d[3], d[5]));
    }
    VPD_INLINE void output(const f32x16* m, f32x16* y) {
        const f32x16 sum = add(m[1], m[2]), difference = subtract(m[1], m[2]);
        const f32x16 wide_sum = add(m[3], m[4]), wide_difference = subtract(m[3], m[4]);
        y[0] = add(m[0], add(sum, wide_sum));
        y[1] = multiply_add(broadcast(2.0f), wide_difference, difference);
        y[2] = multiply_add(broadcast(4.0f), wide_sum, sum);
        y[3] = add(m[5], multiply_add(broadcast(8.0f), wide_difference, difference));
    }
};

// load(p) as an instruction of its own: GCC would rather load a number again for each of its uses.
VPD_INLINE f32x16 load_once(const float* p) {
    f32x16 a = load(p);
#if defined(__AVX512F__)
    asm("" : "+v"(a));
#endif
    return a;
}

// x * sigmoid(x) for results that are rounded to bfloat16 or to 8 bits: with AVX-512 to 5e-5 of it, in half the time.
VPD_INLINE f32x16 rough_silu(f32x16 x) {
#if defined(__AVX512F__)
    // 2^t = 2^floor(t) * 2^f, and 2^f a polynomial on [0, 1) (minimax in the relative error).
    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f));  // -log2(e)
    const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.013534168f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05201146f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24144275f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69300383f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
    const __m512 e = _mm512_scalef_ps(p, t);  // takes the floor itself
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0f))));
#else
    return silu(x);
#endif
}

// --- 8-bit rows ------------------------------------------------------------------------------------------------------

// max(|a|, most), of which NaN is the largest: the bits of numbers that are not negative are ordered as these are.
VPD_INLINE f32x16 larger_magnitude(f32x16 a, f32x16 most) {
#if defined(__AVX512F__)
    const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(a));
    return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_castps_si512(most)));
#else
    typedef int32_t Int32s __attribute__((vector_size(64)));
    Int32s x, y;
    __builtin_memcpy(&x, &a, sizeof x);
    __builtin_memcpy(&y, &most, sizeof y);
    x &= 0x7fffffff;
    x = x > y ? x : y;
    __builtin_memcpy(&a, &x, sizeof a);
    return a;
#endif
}

// Lane i is the larger_magnitude of the lanes of vector i, out of 16 vectors.
VPD_INLINE f32x16 largest_of_each(const f32x16* vectors) {
#if defined(__AVX512F__)
    __m512 half[8], quarter[4], eighth[2];  // so much of each vector is left
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = vectors[i], b = vectors[i + 8];
        half[i] = larger_magnitude(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = half[i], b = half[i + 4];
        quarter[i] = larger_magnitude(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m512 a = quarter[i], b = quarter[i + 2];
        eighth[i] = larger_magnitude(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    const __m512 a = eighth[0], b = eighth[1];
    const __m512 all = larger_magnitude(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(order, all);
#else
    float rows[LANES * LANES], columns[LANES * LANES];
    for (int i = 0; i < LANES; ++i) store(rows + i * LANES, vectors[i]);
    for (int r = 0; r < LANES; r += 4)
        for (int c = 0; c < LANES; c += 4) transpose_4x4(rows + r * LANES + c, LANES, columns + c * LANES + r, LANES);
    f32x16 most = broadcast(0.0f);
    for (int i = 0; i < LANES; ++i) most = larger_magnitude(load(columns + i * LANES), most);
    return most;
#endif
}

// Stores round(a * factor) + 128 as bytes; |a * factor| is at most 127.
VPD_INLINE void store_signed_as_u8(uint8_t* p, f32x16 a, f32x16 factor) {
#if defined(__AVX512F__)
    // At 1.5 * 2^23 the last bit of a float32 is worth 1.
    const __m512 sum = _mm512_fmadd_ps(a, factor, _mm512_set1_ps(12582912.0f + 128.0f));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(sum)));
#else
    store_u8(p, multiply_add(a, factor, broadcast(128.0f)));
#endif
}

// --- types of a plan -------------------------------------------------------------------------------------------------

template <typename W, typename Use>
void with_element(const WinogradConv2dPlan& plan, Use use) {
    switch (plan.precision) {
        case Precision::float32: return use(W{}, F32{});
        case Precision::bfloat16: return use(W{}, Bf16x2{});
        case Precision::int8: return use(W{}, Int8x4{});
    }
}

// Calls use(transform, element), of which only the types matter.
template <typename Use>
void with_types(const WinogradConv2dPlan& plan, Use use) {
    switch (plan.matrices) {
        case 9: return with_element<TwoOutputsOfDoubled>(plan, use);
        case 16: return with_element<TwoOutputs>(plan, use);
        default: return with_element<FourOutputs>(plan, use);
    }
}

}  // namespace
}  // namespace vpd::VPD_ISA
