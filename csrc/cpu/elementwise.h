// Elementwise functions around matrix products: loads and stores of 16 lanes as float32 or bfloat16, activations, and
// rounding to 8 bits.
#pragma once

#include <cstddef>

#include "cpu/simd.h"

namespace vpd::VPD_ISA {
namespace {

#if defined(__AVX512F__)

VPD_INLINE f32x16 load(const uint16_t* p) {  // bfloat16
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
VPD_INLINE void store(uint16_t* p, f32x16 a) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
    const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(a);
#else
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, quiet);
    const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
VPD_INLINE f32x16 from_int32(f32x16 a) { return _mm512_cvtepi32_ps(_mm512_castps_si512(a)); }
// Sixteen numbers rounded to nearest and cut off at 0 and 255; NaN becomes 0.
VPD_INLINE void store_u8(uint8_t* p, f32x16 a) {
    const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(a), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(whole));
}
// 1 / a for a in [1, 2^100], to 1 unit in the last place.
VPD_INLINE f32x16 reciprocal(f32x16 a) {
    const __m512 r = _mm512_rcp14_ps(a);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0f)), r);
}

#elif defined(__AVX2__)

VPD_INLINE __m256 load_half(const uint16_t* p) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
VPD_INLINE f32x16 load(const uint16_t* p) { return {load_half(p), load_half(p + 8)}; }
VPD_INLINE __m256i bf16_bits(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}
VPD_INLINE void store(uint16_t* p, f32x16 a) {
    const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
VPD_INLINE f32x16 from_int32(f32x16 a) {
    return {_mm256_cvtepi32_ps(_mm256_castps_si256(a.lo)), _mm256_cvtepi32_ps(_mm256_castps_si256(a.hi))};
}
VPD_INLINE void store_u8(uint8_t* p, f32x16 a) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
VPD_INLINE f32x16 reciprocal(f32x16 a) { return divide(broadcast(1.0f), a); }

#else

VPD_INLINE f32x16 load(const uint16_t* p) {
    float lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = from_bf16(p[i]);
    return load(lanes);
}
VPD_INLINE void store(uint16_t* p, f32x16 a) {
    float lanes[LANES];
    store(lanes, a);
    for (int i = 0; i < LANES; ++i) p[i] = to_bf16(lanes[i]);
}
VPD_INLINE f32x16 from_int32(f32x16 a) {
    for (int i = 0; i < 4; ++i) a.v[i] = __builtin_convertvector((i32x4)a.v[i], f32x4);
    return a;
}
VPD_INLINE void store_u8(uint8_t* p, f32x16 a) {
    float lanes[LANES];
    store(lanes, round(min(max(a, broadcast(0.0f)), broadcast(255.0f))));  // max returns its second operand for NaN
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
}
VPD_INLINE f32x16 reciprocal(f32x16 a) { return divide(broadcast(1.0f), a); }

#endif

#if defined(__AVX512F__)

VPD_INLINE Mask first_lanes(int64_t n) { return static_cast<Mask>((1u << n) - 1); }
// The first n (at most 16) of them; the other lanes are 0.
VPD_INLINE f32x16 load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
VPD_INLINE f32x16 load_part(const uint16_t* p, int64_t n) {
    const __m256i narrow = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
VPD_INLINE void store_part(float* p, f32x16 a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
VPD_INLINE void store_part(uint16_t* p, f32x16 a, int64_t n) {
    uint16_t lanes[LANES];
    store(lanes, a);
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
}

#else

// The first n (at most 16) of them; the other lanes are 0.
template <typename T>
VPD_INLINE f32x16 load_part(const T* p, int64_t n) {
    T lanes[LANES] = {};
    __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
    return load(lanes);
}

template <typename T>
VPD_INLINE void store_part(T* p, f32x16 a, int64_t n) {
    T lanes[LANES];
    store(lanes, a);
    __builtin_memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

#endif

VPD_INLINE void store_u8_part(uint8_t* p, f32x16 a, int64_t n) {
    uint8_t lanes[LANES];
    store_u8(lanes, a);
    __builtin_memcpy(p, lanes, static_cast<size_t>(n));
}

// x * sigmoid(x). The exponential is of -|x|, so nothing overflows.
VPD_INLINE f32x16 silu(f32x16 x) {
    const f32x16 e = exp2_of_nonpositive(multiply(absolute(x), broadcast(-1.44269504088896341f)));  // -log2(e)
    const f32x16 larger = reciprocal(add(e, broadcast(1.0f)));                                      // sigmoid(|x|)
    return multiply(x, select(greater(x, broadcast(0.0f)), larger, multiply(e, larger)));
}

// x * P(normal <= x) = x * erfc(-x / sqrt 2) / 2, to 3e-7 * |x|: Abramowitz and Stegun, 7.1.26.
VPD_INLINE f32x16 gelu(f32x16 x) {
    const f32x16 t = reciprocal(multiply_add(absolute(x), broadcast(0.3275911f * 0.70710678f), broadcast(1.0f)));
    f32x16 p = broadcast(1.061405429f * 0.5f);
    p = multiply_add(p, t, broadcast(-1.453152027f * 0.5f));
    p = multiply_add(p, t, broadcast(1.421413741f * 0.5f));
    p = multiply_add(p, t, broadcast(-0.284496736f * 0.5f));
    p = multiply_add(p, t, broadcast(0.254829592f * 0.5f));
    const f32x16 square = multiply(multiply(x, x), broadcast(-0.5f * 1.44269504088896341f));
    const f32x16 tail = multiply(multiply(p, t), exp2_of_nonpositive(square));  // of |x|
    return multiply(x, select(greater(x, broadcast(0.0f)), subtract(broadcast(1.0f), tail), tail));
}

}  // namespace
}  // namespace vpd::VPD_ISA
