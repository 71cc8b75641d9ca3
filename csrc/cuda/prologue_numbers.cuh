// Eight neighbouring channels of a position: how the prologue's kernels read, change, round and store them.
#pragma once

#include "cuda/primitives.cuh"
#include "cuda/prologue.h"

namespace vpd::prologue {

using namespace device;

constexpr int WARP = 32, CHANNELS = 8;                                // of a vector, which one thread handles
constexpr float MAX_FLOAT8 = 448.0f, TINY = 1.1754943508222875e-38f;  // the smallest normal number
constexpr float LOG2_E = 1.44269504088896341f;

// As they lie in memory: 16 or 32 bytes.
template <typename In>
struct Vector {
    uint4 words;

    __device__ static Vector load(const In* from) { return {load_global(reinterpret_cast<const uint4*>(from))}; }
    __device__ void unpack_to(float (&a)[CHANNELS]) const {
        unpack<In>(words.x, a[0], a[1]), unpack<In>(words.y, a[2], a[3]);
        unpack<In>(words.z, a[4], a[5]), unpack<In>(words.w, a[6], a[7]);
    }
};
template <>
struct Vector<float> {
    float4 low, high;

    __device__ static Vector load(const float* from) {
        const float4* const fours = reinterpret_cast<const float4*>(from);
        return {load_global(fours), load_global(fours + 1)};
    }
    __device__ void unpack_to(float (&a)[CHANNELS]) const {
        a[0] = low.x, a[1] = low.y, a[2] = low.z, a[3] = low.w;
        a[4] = high.x, a[5] = high.y, a[6] = high.z, a[7] = high.w;
    }
};

// x / (1 + e^-x), within 4 units in the last place.
__device__ inline float silu(float x) {
    return multiply_rounded(x, reciprocal_fast(1.0f + exp2_fast(multiply_rounded(x, -LOG2_E))));
}

// Least and largest number, 0 among them; the least is NaN if a number was not finite.
struct Range {
    float low = 0.0f, high = 0.0f, check = 0.0f;

    __device__ void add(float x) { low = fminf(low, x), high = fmaxf(high, x), check = fmaf(x, 0.0f, check); }
    __device__ void add(const Range& other) {
        low = fminf(low, other.low), high = fmaxf(high, other.high), check += other.check;
    }
    __device__ float least() const { return check == 0.0f ? low : NAN; }
};
__device__ inline Range shuffled(const Range& r, int mask) {
    Range other;
    other.low = shuffle_xor(r.low, mask), other.high = shuffle_xor(r.high, mask),
    other.check = shuffle_xor(r.check, mask);
    return other;
}
__device__ inline Range range_of_warp(Range r) {
    for (int mask = WARP / 2; mask; mask /= 2) r.add(shuffled(r, mask));
    return r;
}

// What numbers of a range are multiplied by before they are rounded, and what is added; scale and zero as
// vpd_fast/ops/rounding.py defines them.
struct Step {
    float scale, inverse, zero;
};
template <typename Out>
__device__ inline Step step_of(float low, float high) {
    constexpr bool FLOAT8 = std::is_same_v<Out, Float8>;
    Step step;
    step.scale = FLOAT8 ? fmaxf(-low, high) / MAX_FLOAT8 : (high - low) / 255.0f;
    if (step.scale < TINY) step.scale = 0.0f;
    if (!(step.scale < INFINITY) || low != low) step.scale = NAN;
    step.inverse = step.scale > 0.0f ? 1.0f / step.scale : 0.0f;
    step.zero = 0.0f;
    if (!FLOAT8 && step.inverse > 0.0f) step.zero = floorf(multiply_rounded(-low, step.inverse) + 0.5f);
    return step;
}

// Rounding to nearest, ties to even, and storing.
template <typename Out>
struct Rounded {  // 16 bits
    using Number = Out;
    using Words = uint4;

    __device__ static Words of(const float (&a)[CHANNELS], const Step&) {
        return {pack<Out>(a[0], a[1]), pack<Out>(a[2], a[3]), pack<Out>(a[4], a[5]), pack<Out>(a[6], a[7])};
    }
};
template <>
struct Rounded<int8_t> {
    using Number = int8_t;
    using Words = uint2;

    // The low byte is the number between 0 and 255 less 128. What is not finite, whose scale is NaN, becomes any number.
    __device__ static uint32_t bits(float a, const Step& step) {
        const float number = multiply_rounded(a, step.inverse) + step.zero;
        return bits_of(fminf(fmaxf(number, 0.0f), 255.0f) + (12582912.0f - 128.0f));  // 1.5 * 2^23
    }
    __device__ static Words of(const float (&a)[CHANNELS], const Step& s) {
        return {low_bytes(bits(a[0], s), bits(a[1], s), bits(a[2], s), bits(a[3], s)),
                low_bytes(bits(a[4], s), bits(a[5], s), bits(a[6], s), bits(a[7], s))};
    }
};
template <>
struct Rounded<Float8> {
    using Number = uint8_t;
    using Words = uint2;

    __device__ static Words of(const float (&a)[CHANNELS], const Step& s) {
        float b[CHANNELS];
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) b[i] = multiply_rounded(a[i], s.inverse);
        return {pack_float8(b[0], b[1], b[2], b[3]), pack_float8(b[4], b[5], b[6], b[7])};
    }
};

template <typename Out>
__device__ inline void store(typename Rounded<Out>::Number* to, const typename Rounded<Out>::Words& words) {
    store_global(reinterpret_cast<typename Rounded<Out>::Words*>(to), words);
}

// Eight numbers of a vector of float32, or eight times `otherwise` if there is none.
__device__ inline void load_numbers(const float* from, int64_t offset, float otherwise, float (&to)[CHANNELS]) {
    if (from) {
        Vector<float>::load(from + offset).unpack_to(to);
        return;
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) to[i] = otherwise;
}

}  // namespace vpd::prologue
