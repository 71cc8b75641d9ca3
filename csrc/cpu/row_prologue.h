// Prologue of one row of A: its numbers are transformed in float32, then rounded to the elements that are multiplied.
//
// Whole vectors are stored, also where less is left: what follows in the row is written later, and behind the last
// number there is room for 16 more, which become zero.
#pragma once

#include <cfloat>

#include "cpu/elementwise.h"
#include "cpu/gemm.h"
#include "cpu/matrix_tile.h"

namespace vpd::VPD_ISA {
namespace {

// a -> silu((a - mean) * inverse_deviation * scale + shift) * smoothing, channel by channel; null or false: without.
struct Transform {
    const float *scale, *shift;
    bool silu;
    const float* smoothing;
    bool norm = false;
    float mean = 0.0f, inverse_deviation = 1.0f;

    bool nothing() const { return !scale && !silu && !smoothing && !norm; }
    Transform from(int64_t channel) const {
        Transform t = *this;
        if (scale) t.scale += channel, t.shift += channel;
        if (smoothing) t.smoothing += channel;
        return t;
    }
};

// Range of the numbers of a row and of 0. `unusual` becomes NaN if one of them is infinite or NaN.
struct Range {
    f32x16 low = broadcast(0.0f), high = broadcast(0.0f), unusual = broadcast(0.0f);
};

template <typename T>
VPD_INLINE f32x16 load_some(const T* p, int64_t count) {
    return count < LANES ? load_part(p, count) : load(p);
}

// Transforms the first `count` of the 16 channels from `channel` on. 0 stays 0 without norm and parameters.
template <bool SILU>
VPD_INLINE f32x16 transformed(f32x16 x, const Transform& t, int64_t channel, int64_t count) {
    if (t.norm) x = VPD_ISA::multiply(subtract(x, broadcast(t.mean)), broadcast(t.inverse_deviation));
    if (t.scale) x = multiply_add(x, load_some(t.scale + channel, count), load_some(t.shift + channel, count));
    if (SILU) x = silu(x);
    if (t.smoothing) x = VPD_ISA::multiply(x, load_some(t.smoothing + channel, count));
    return x;
}

constexpr int64_t PREFETCH_BYTES = 2048;  // distance; the hardware's prefetcher stops at a page of 4096 bytes

template <bool SILU, typename From, typename To>
VPD_INLINE void transform_numbers(const From* from, int64_t count, const Transform t, To* to, Range* range) {
    constexpr int64_t STEP = 2 * LANES;
    f32x16 low = broadcast(0.0f), high = low, unusual[2] = {low, low};  // two: each addition waits for the one before
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        __builtin_prefetch(reinterpret_cast<const char*>(from + i) + PREFETCH_BYTES);
#pragma GCC unroll 2
        for (int64_t j = 0; j < 2; ++j) {
            const int64_t at = i + j * LANES;
            const f32x16 x = transformed<SILU>(load(from + at), t, at, LANES);
            if (range)
                low = min(x, low), high = max(x, high), unusual[j] = multiply_add(x, broadcast(0.0f), unusual[j]);
            store(to + at, x);
        }
    }
    for (; i < count; i += LANES) {
        const int64_t left = count - i;
        f32x16 x = transformed<SILU>(load_some(from + i, left), t, i, left);
        if (t.norm && left < LANES) {  // the other lanes are not 0
            float lanes[LANES];
            store(lanes, x);
            x = load_part(lanes, left);
        }
        if (range) low = min(x, low), high = max(x, high), unusual[0] = multiply_add(x, broadcast(0.0f), unusual[0]);
        store(to + i, x);
    }
    if (!range) return;
    range->low = min(low, range->low), range->high = max(high, range->high);
    range->unusual = add(add(unusual[0], unusual[1]), range->unusual);
}

// to[i] = transform(from[i]); extends the range, unless it is null, by the stored numbers.
template <typename From, typename To>
VPD_INLINE void transform_piece(const From* from, int64_t count, const Transform& t, To* to, Range* range) {
    t.silu ? transform_numbers<true>(from, count, t, to, range) : transform_numbers<false>(from, count, t, to, range);
}

template <typename To>
VPD_INLINE void transform_piece(const Source& source, int64_t offset, int64_t count, const Transform& t, To* to,
                                Range* range) {
    source.bf16 ? transform_piece(static_cast<const uint16_t*>(source.data) + offset, count, t, to, range)
                : transform_piece(static_cast<const float*>(source.data) + offset, count, t, to, range);
}

template <typename To>
VPD_INLINE void clear_piece(To* to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, broadcast(0.0f));
}

VPD_INLINE float reduce_sum(f32x16 a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(a);
#else
    float lanes[LANES];
    store(lanes, a);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
#endif
}

VPD_INLINE float reduce_max_finite(f32x16 a) {  // no lane is NaN
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(a);
#else
    return reduce_max(a);
#endif
}

// Rounds `size` numbers to bytes, and writes scale and zero behind their elements. A row that is not finite gets a scale
// that is not, which makes its results NaN; one whose scale would be denormal is zero.
VPD_INLINE void quantize_row(const float* numbers, int64_t size, const Range& range, float* to) {
    const float low = -reduce_max_finite(subtract(broadcast(0.0f), range.low)), high = reduce_max_finite(range.high);
    float scale = (high - low) / 255.0f + reduce_sum(range.unusual);
    if (scale < FLT_MIN) scale = 0.0f;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    const int32_t zero = inverse > 0.0f ? static_cast<int32_t>(-low * inverse + 0.5f) : 0;
    const f32x16 factor = broadcast(inverse), shift = broadcast(static_cast<float>(zero));
    auto* bytes = reinterpret_cast<uint8_t*>(to);
    for (int64_t i = 0; i < size; i += LANES)
        store_u8(bytes + i, add(VPD_ISA::multiply(load(numbers + i), factor), shift));
    float* scale_and_zero = to + elements<Int8x4>(size);
    scale_and_zero[0] = scale;
    __builtin_memcpy(scale_and_zero + 1, &zero, sizeof zero);
}

// Makes rows [first, first + count) of A: make(image, row, to, range) writes the next one, whose elements are of the type
// of `to`; 8 bits are made of float32 in `scratch`.
template <typename Make>
VPD_INLINE void make_rows(const GemmPlan& plan, int64_t first, int64_t count, float* a, float* scratch, Make make) {
    int64_t image = first / plan.rows, row = first % plan.rows;
    for (int64_t r = 0; r < count; ++r, a += plan.row_floats) {
        if (plan.precision == Precision::float32) {
            make(image, row, a, nullptr);
        } else if (plan.precision == Precision::bfloat16) {
            make(image, row, reinterpret_cast<uint16_t*>(a), nullptr);
        } else {
            Range range;
            make(image, row, scratch, &range);
            quantize_row(scratch, plan.k, range, a);
        }
        if (++row == plan.rows) row = 0, ++image;
    }
}

}  // namespace
}  // namespace vpd::VPD_ISA
