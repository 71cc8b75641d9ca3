// Sixteen float or int32 lanes, written once per instruction set level. Kernels use these types only, so their source
// and their data layout are the same at every level; only the rounding of multiply_add differs (no FMA in the baseline).
//
// Everything is forced inline and in an unnamed namespace: a function that the linker could share between files
// compiled for different levels would run AVX-512 code on machines without it.
#pragma once

#include <cstdint>

#include "sizes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VPD_INLINE static inline __attribute__((always_inline))

namespace vpd::VPD_ISA {
namespace {

#if defined(__AVX512F__)

using f32x16 = __m512;
using i32x16 = __m512i;
using Mask = __mmask16;

VPD_INLINE f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
VPD_INLINE f32x16 broadcast(float x) { return _mm512_set1_ps(x); }
VPD_INLINE i32x16 broadcast(int32_t x) { return _mm512_set1_epi32(x); }
VPD_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a); }
VPD_INLINE f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
VPD_INLINE f32x16 subtract(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
VPD_INLINE f32x16 multiply(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
VPD_INLINE f32x16 divide(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
VPD_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
// min and max return the second operand when one of the two is NaN.
VPD_INLINE f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
VPD_INLINE f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
VPD_INLINE f32x16 absolute(f32x16 a) { return _mm512_abs_ps(a); }
VPD_INLINE Mask greater(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
VPD_INLINE Mask not_less(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
VPD_INLINE Mask is_nan(f32x16 a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
VPD_INLINE Mask nonzero(f32x16 a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
VPD_INLINE Mask either(Mask a, Mask b) { return a | b; }
VPD_INLINE Mask and_not(Mask a, Mask b) { return a & ~b; }
VPD_INLINE uint32_t bits(Mask m) { return m; }
VPD_INLINE f32x16 select(Mask m, f32x16 yes, f32x16 no) { return _mm512_mask_blend_ps(m, no, yes); }
VPD_INLINE i32x16 select(Mask m, i32x16 yes, i32x16 no) { return _mm512_mask_blend_epi32(m, no, yes); }
VPD_INLINE f32x16 round(f32x16 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p * 2^n for p in [0.7, 1.5] and whole n in [-160, 0], or NaN.
VPD_INLINE f32x16 scale_by_power(f32x16 p, f32x16 n) { return _mm512_scalef_ps(p, n); }
VPD_INLINE void store_widened(int64_t* p, i32x16 a) {
    _mm512_storeu_si512(p, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(a)));
    _mm512_storeu_si512(p + 8, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(a, 1)));
}

VPD_INLINE f32x16 low_bf16(f32x16 a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 16)); }
VPD_INLINE f32x16 high_bf16(f32x16 a) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(-65536)));
}
// Every lane: sum + the products of four unsigned bytes of a with four signed ones of b, as int32.
VPD_INLINE f32x16 dot_4x8(f32x16 a_, f32x16 b_, f32x16 sum_) {
    const __m512i a = _mm512_castps_si512(a_), b = _mm512_castps_si512(b_), sum = _mm512_castps_si512(sum_);
#if defined(__AVX512VNNI__)
    return _mm512_castsi512_ps(_mm512_dpbusd_epi32(sum, a, b));
#else
    const __m512i a_even = _mm512_and_si512(a, _mm512_set1_epi16(0xff)), a_odd = _mm512_srli_epi16(a, 8);
    const __m512i b_even = _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), b_odd = _mm512_srai_epi16(b, 8);
    const __m512i both = _mm512_add_epi32(_mm512_madd_epi16(a_even, b_even), _mm512_madd_epi16(a_odd, b_odd));
    return _mm512_castsi512_ps(_mm512_add_epi32(sum, both));
#endif
}

#elif defined(__AVX2__)

struct f32x16 {
    __m256 lo, hi;
};
struct i32x16 {
    __m256i lo, hi;
};
using Mask = f32x16;  // all ones or all zeros per lane

VPD_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
VPD_INLINE f32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
VPD_INLINE i32x16 broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
VPD_INLINE void store(float* p, f32x16 a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
VPD_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
VPD_INLINE f32x16 subtract(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
VPD_INLINE f32x16 multiply(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
VPD_INLINE f32x16 divide(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
VPD_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
VPD_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
VPD_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
VPD_INLINE f32x16 absolute(f32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
VPD_INLINE Mask greater(f32x16 a, f32x16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
VPD_INLINE Mask not_less(f32x16 a, f32x16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ)};
}
VPD_INLINE Mask is_nan(f32x16 a) {
    return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
VPD_INLINE Mask nonzero(f32x16 a) {
    const __m256 zero = _mm256_setzero_ps();
    return {_mm256_cmp_ps(a.lo, zero, _CMP_NEQ_UQ), _mm256_cmp_ps(a.hi, zero, _CMP_NEQ_UQ)};
}
VPD_INLINE Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
VPD_INLINE Mask and_not(Mask a, Mask b) { return {_mm256_andnot_ps(b.lo, a.lo), _mm256_andnot_ps(b.hi, a.hi)}; }
VPD_INLINE uint32_t bits(Mask m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}
VPD_INLINE f32x16 select(Mask m, f32x16 yes, f32x16 no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
VPD_INLINE i32x16 select(Mask m, i32x16 yes, i32x16 no) {
    return {_mm256_blendv_epi8(no.lo, yes.lo, _mm256_castps_si256(m.lo)),
            _mm256_blendv_epi8(no.hi, yes.hi, _mm256_castps_si256(m.hi))};
}
VPD_INLINE f32x16 round(f32x16 x) {
    return {_mm256_round_ps(x.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
VPD_INLINE __m256 scale_by_power(__m256 p, __m256 n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    // Below 2^-126 there is no exponent left. NaN stays, whatever its bits became.
    const __m256 kept = _mm256_and_ps(scaled, _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_GT_OQ));
    return _mm256_blendv_ps(kept, p, _mm256_cmp_ps(p, p, _CMP_UNORD_Q));
}
VPD_INLINE f32x16 scale_by_power(f32x16 p, f32x16 n) {
    return {scale_by_power(p.lo, n.lo), scale_by_power(p.hi, n.hi)};
}
VPD_INLINE void store_widened(int64_t* p, i32x16 a) {
    const __m256i halves[2] = {a.lo, a.hi};
    for (int i = 0; i < 2; ++i, p += 8) {
        auto* out = reinterpret_cast<__m256i*>(p);
        _mm256_storeu_si256(out, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(halves[i])));
        _mm256_storeu_si256(out + 1, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(halves[i], 1)));
    }
}

VPD_INLINE __m256 low_bf16(__m256 a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 16)); }
VPD_INLINE __m256 high_bf16(__m256 a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(-65536))); }
VPD_INLINE f32x16 low_bf16(f32x16 a) { return {low_bf16(a.lo), low_bf16(a.hi)}; }
VPD_INLINE f32x16 high_bf16(f32x16 a) { return {high_bf16(a.lo), high_bf16(a.hi)}; }
VPD_INLINE __m256 dot_4x8(__m256 a_, __m256 b_, __m256 sum) {
    const __m256i a = _mm256_castps_si256(a_), b = _mm256_castps_si256(b_);
    const __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(0xff)), a_odd = _mm256_srli_epi16(a, 8);
    const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b_odd = _mm256_srai_epi16(b, 8);
    const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(a_even, b_even), _mm256_madd_epi16(a_odd, b_odd));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum), both));
}
// Every lane: sum + the products of four unsigned bytes of a with four signed ones of b, as int32.
VPD_INLINE f32x16 dot_4x8(f32x16 a, f32x16 b, f32x16 sum) {
    return {dot_4x8(a.lo, b.lo, sum.lo), dot_4x8(a.hi, b.hi, sum.hi)};
}

#else  // portable: four vectors of four lanes, which GCC and Clang turn into SSE2, NEON or whatever the target has

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
struct f32x16 {
    f32x4 v[4];
};
struct i32x16 {
    i32x4 v[4];
};
using Mask = i32x16;  // -1 or 0 per lane

#define VPD_EACH(RESULT, EXPRESSION)                     \
    {                                                    \
        RESULT r;                                        \
        for (int i = 0; i < 4; ++i) r.v[i] = EXPRESSION; \
        return r;                                        \
    }

VPD_INLINE f32x4 select4(i32x4 m, f32x4 yes, f32x4 no) { return (f32x4)(((i32x4)yes & m) | ((i32x4)no & ~m)); }

VPD_INLINE f32x16 load(const float* p) {
    f32x16 a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
}
VPD_INLINE f32x16 broadcast(float x) VPD_EACH(f32x16, (f32x4{x, x, x, x}))
VPD_INLINE i32x16 broadcast(int32_t x) VPD_EACH(i32x16, (i32x4{x, x, x, x}))
VPD_INLINE void store(float* p, f32x16 a) { __builtin_memcpy(p, &a, sizeof a); }
VPD_INLINE f32x16 add(f32x16 a, f32x16 b) VPD_EACH(f32x16, a.v[i] + b.v[i])
VPD_INLINE f32x16 subtract(f32x16 a, f32x16 b) VPD_EACH(f32x16, a.v[i] - b.v[i])
VPD_INLINE f32x16 multiply(f32x16 a, f32x16 b) VPD_EACH(f32x16, a.v[i] * b.v[i])
VPD_INLINE f32x16 divide(f32x16 a, f32x16 b) VPD_EACH(f32x16, a.v[i] / b.v[i])
VPD_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) VPD_EACH(f32x16, a.v[i] * b.v[i] + c.v[i])
VPD_INLINE f32x16 select(Mask m, f32x16 yes, f32x16 no) VPD_EACH(f32x16, select4(m.v[i], yes.v[i], no.v[i]))
VPD_INLINE i32x16 select(Mask m, i32x16 yes, i32x16 no) VPD_EACH(i32x16, (yes.v[i] & m.v[i]) | (no.v[i] & ~m.v[i]))
VPD_INLINE f32x16 min(f32x16 a, f32x16 b) VPD_EACH(f32x16, select4(a.v[i] < b.v[i], a.v[i], b.v[i]))
VPD_INLINE f32x16 max(f32x16 a, f32x16 b) VPD_EACH(f32x16, select4(a.v[i] > b.v[i], a.v[i], b.v[i]))
VPD_INLINE f32x16 absolute(f32x16 a) VPD_EACH(f32x16, (f32x4)((i32x4)a.v[i] & 0x7fffffff))
VPD_INLINE Mask greater(f32x16 a, f32x16 b) VPD_EACH(Mask, a.v[i] > b.v[i])
VPD_INLINE Mask not_less(f32x16 a, f32x16 b) VPD_EACH(Mask, ~(a.v[i] < b.v[i]))
VPD_INLINE Mask is_nan(f32x16 a) VPD_EACH(Mask, a.v[i] != a.v[i])
VPD_INLINE Mask nonzero(f32x16 a) VPD_EACH(Mask, a.v[i] != f32x4{})
VPD_INLINE Mask either(Mask a, Mask b) VPD_EACH(Mask, a.v[i] | b.v[i])
VPD_INLINE Mask and_not(Mask a, Mask b)
    VPD_EACH(Mask, a.v[i] & ~b.v[i])
// Adding 1.5 * 2^23 leaves no bits for a fraction.
VPD_INLINE f32x16 round(f32x16 x) VPD_EACH(f32x16, (x.v[i] + 12582912.0f) - 12582912.0f)
VPD_INLINE f32x4 scale_by_power(f32x4 p, f32x4 n) {
    const i32x4 exponent = (i32x4)(n + 12582912.0f) << 23;
    const f32x4 scaled = (f32x4)((i32x4)p + exponent);
    return select4(p != p, p, (f32x4)((i32x4)scaled & (n > -126.0f)));
}
VPD_INLINE f32x16 scale_by_power(f32x16 p, f32x16 n) VPD_EACH(f32x16, scale_by_power(p.v[i], n.v[i]))
VPD_INLINE uint32_t bits(Mask m) {
    uint32_t result = 0;
    for (int i = 0; i < LANES; ++i) result |= (static_cast<uint32_t>(m.v[i / 4][i % 4]) & 1u) << i;
    return result;
}
VPD_INLINE void store_widened(int64_t* p, i32x16 a) {
    for (int i = 0; i < LANES; ++i) p[i] = a.v[i / 4][i % 4];
}

VPD_INLINE f32x16 low_bf16(f32x16 a) VPD_EACH(f32x16, (f32x4)((i32x4)a.v[i] << 16))
VPD_INLINE f32x16 high_bf16(f32x16 a) VPD_EACH(f32x16, (f32x4)((i32x4)a.v[i] & ~0xffff))
VPD_INLINE i32x4 multiply_bytes(i32x4 a, i32x4 b, int byte) {
    return (a >> 8 * byte & 0xff) * (b << (24 - 8 * byte) >> 24);
}
VPD_INLINE f32x4 dot_4x8(f32x4 a, f32x4 b, f32x4 sum) {
    i32x4 result = (i32x4)sum;
    for (int byte = 0; byte < 4; ++byte) result += multiply_bytes((i32x4)a, (i32x4)b, byte);
    return (f32x4)result;
}
// Every lane: sum + the products of four unsigned bytes of a with four signed ones of b, as int32.
VPD_INLINE f32x16 dot_4x8(f32x16 a, f32x16 b, f32x16 sum) VPD_EACH(f32x16, dot_4x8(a.v[i], b.v[i], sum.v[i]))

#undef VPD_EACH

#endif

VPD_INLINE float reduce_max(f32x16 a) {
    float lanes[LANES];
    store(lanes, a);
    float result = lanes[0];
    for (int i = 1; i < LANES; ++i) result = lanes[i] > result ? lanes[i] : result;
    return result;
}

// 2^x for x <= 0, to 0.7 units in the last place (0 below -126 or -149, by level); NaN for NaN. 2^x = 2^n * 2^f with
// n = round(x), and 2^f a polynomial of degree 6 on [-1/2, 1/2] (minimax in the relative error, constant term 1).
VPD_INLINE f32x16 exp2_of_nonpositive(f32x16 x) {
    x = max(broadcast(-160.0f), x);
    const f32x16 n = round(x), f = subtract(x, n);
    f32x16 p = broadcast(0.00015353359f);
    p = multiply_add(p, f, broadcast(0.0013398874f));
    p = multiply_add(p, f, broadcast(0.009618437f));
    p = multiply_add(p, f, broadcast(0.055503324f));
    p = multiply_add(p, f, broadcast(0.24022648f));
    p = multiply_add(p, f, broadcast(0.6931472f));
    p = multiply_add(p, f, broadcast(1.0f));
    return scale_by_power(p, n);
}

// --- bfloat16: the upper half of a float32 ---------------------------------------------------------------------------

VPD_INLINE float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof bits);
    return result;
}

VPD_INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 4 rows x 4 columns -> 4 columns x 4 rows, of 32-bit elements.
VPD_INLINE void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    typedef float V4 __attribute__((vector_size(16)));
    typedef int32_t Order __attribute__((vector_size(16)));
    V4 a, b, c, d;
    __builtin_memcpy(&a, from, 16);
    __builtin_memcpy(&b, from + from_stride, 16);
    __builtin_memcpy(&c, from + 2 * from_stride, 16);
    __builtin_memcpy(&d, from + 3 * from_stride, 16);
    const V4 ab_low = __builtin_shuffle(a, b, Order{0, 4, 1, 5}), ab_high = __builtin_shuffle(a, b, Order{2, 6, 3, 7});
    const V4 cd_low = __builtin_shuffle(c, d, Order{0, 4, 1, 5}), cd_high = __builtin_shuffle(c, d, Order{2, 6, 3, 7});
    const V4 rows[4] = {
        __builtin_shuffle(ab_low, cd_low, Order{0, 1, 4, 5}), __builtin_shuffle(ab_low, cd_low, Order{2, 3, 6, 7}),
        __builtin_shuffle(ab_high, cd_high, Order{0, 1, 4, 5}), __builtin_shuffle(ab_high, cd_high, Order{2, 3, 6, 7})};
    for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * to_stride, &rows[i], 16);
}

}  // namespace
}  // namespace vpd::VPD_ISA
