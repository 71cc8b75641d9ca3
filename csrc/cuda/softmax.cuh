// Exponentials of scores in the registers of matrix instructions: a thread has scores of two rows, i / 2 % 2 being the
// row of score i, and shares these rows with three others.
#pragma once

#include "cuda/quads.cuh"

namespace vpd::device {

constexpr double LOG2_E = 1.4426950408889634;

// 2^x for x up to 126, within 1e-4 of it; 2^-126 at least. NaN stays NaN.
__device__ inline float exp2_polynomial(float x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23, to which a number is added as an integer
    x = larger_or_nan(x, -126.0f);
    const float shifted = x + ROUND, rest = x - (shifted - ROUND);  // of -0.5 to 0.5
    const float power = fmaf(fmaf(fmaf(0.05517167f, rest, 0.24261112f), rest, 0.69326099f), rest, 0.99992807f);
    return power * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

// The largest scores so far of both rows, to which exponents are relative: 2^((score - largest) * scale).
struct Largest {
    static constexpr float MAX_FLOAT = 3.4028234664e38f;
    // The product of the largest score and the scale, rounded, is what exponents are relative to, with one fma for
    // each. From here on that rounding would show in the largest probability, so the largest score is subtracted first.
    static constexpr float MAX_REFERENCE = 16384.0f;
    float score[2] = {-MAX_FLOAT, -MAX_FLOAT}, reference[2];

    // Returns whether some row of the warp has scores so large that they must be subtracted first.
    template <int COUNT>
    __device__ inline bool include(const float (&s)[COUNT], float scale) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) score[i / 2 % 2] = fmaxf(score[i / 2 % 2], s[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            score[half] = quad_max(score[half]);
            reference[half] = score[half] * scale;
        }
        return any_in_warp(fmaxf(fabsf(reference[0]), fabsf(reference[1])) >= MAX_REFERENCE);
    }
    // Scores become exponentials. POLYNOMIAL: which share of them is computed without the unit for exponentials, one of
    // so many, or 0.
    template <int POLYNOMIAL, int COUNT>
    __device__ inline void exponentials(float (&s)[COUNT], float scale) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            constexpr int OF = POLYNOMIAL ? POLYNOMIAL : 1;
            const float exponent = fmaf(s[i], scale, -reference[i / 2 % 2]);
            s[i] = POLYNOMIAL && i % OF == OF - 1 ? exp2_polynomial(exponent) : exp2_fast(exponent);
        }
    }
    template <int COUNT>
    __device__ inline void exponentials_of_huge(float (&s)[COUNT], float scale) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) s[i] = exp2_fast((s[i] - score[i / 2 % 2]) * scale);
    }
};

template <int COUNT>
__device__ inline void add_rows(float (&sum)[2], const float (&s)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum[i / 2 % 2] += s[i];
}

// Numbers rounded to 16 bits, as the left operand of matrix instructions: 16 columns per step.
template <typename T, int STEPS, int COUNT>
__device__ inline void pack_rows(uint32_t (&p)[STEPS][4], const float (&s)[COUNT]) {
    static_assert(COUNT == STEPS * 8);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[step][i] = pack<T>(s[step * 8 + 2 * i], s[step * 8 + 2 * i + 1]);
}

// Columns from the last one on count nothing in what is to become exponentials.
template <int FIRST, int COUNT>
__device__ inline void mask_columns(float (&s)[COUNT], int valid, int lane) {
#pragma unroll
    for (int i = FIRST / 2; i < COUNT; ++i)
        if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid) s[i] = -INFINITY;
}

}  // namespace vpd::device
