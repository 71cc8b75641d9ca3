// Shared by the attention kernels: the elements of their matrices, loads and stores of these, and the softmax of a tile of
// queries.
//
// The lanes of a vector are queries. So the numbers of a softmax lie in different vectors (nothing is reduced across
// lanes), and keys and head dimensions need no padding for it: elements of K and V are broadcast.
#pragma once

#include "cpu/attention.h"
#include "cpu/elementwise.h"
#include "cpu/matrix_tile.h"

namespace vpd::VPD_ISA {
namespace {

#if defined(__AVX512BF16__)
using Bf16Element = Bf16x2;

// The upper halves of two vectors as pairs.
VPD_INLINE f32x16 join_upper_halves(f32x16 low, f32x16 high) {
    const __m512i odd =
        _mm512_set_epi32(0x3f001f, 0x3d001d, 0x3b001b, 0x390019, 0x370017, 0x350015, 0x330013, 0x310011, 0x2f000f,
                         0x2d000d, 0x2b000b, 0x290009, 0x270007, 0x250005, 0x230003, 0x210001);
    return _mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castps_si512(low), odd, _mm512_castps_si512(high)));
}
#else
using Bf16Element = F32;  // widened while it is packed
#endif

// to[column][row] = from[row][column]
VPD_INLINE void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                          int64_t to_stride) {
    const int64_t r4 = rows / 4 * 4, c4 = columns / 4 * 4;
    for (int64_t r = 0; r < r4; r += 4)
        for (int64_t c = 0; c < c4; c += 4)
            transpose_4x4(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = r < r4 ? c4 : 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

VPD_INLINE float to_float(float x) { return x; }
VPD_INLINE float to_float(uint16_t x) { return from_bf16(x); }

VPD_INLINE float from_bits(uint32_t bits) {
    float result;
    __builtin_memcpy(&result, &bits, sizeof bits);
    return result;
}

VPD_INLINE float pair_of(uint16_t low, uint16_t high) { return from_bits(low | static_cast<uint32_t>(high) << 16); }

// Element i of `size` numbers; a missing partner is zero.
template <typename E, typename T>
VPD_INLINE float element(const T* numbers, int64_t i, int64_t size) {
    if constexpr (E::WIDTH == 1)
        return to_float(numbers[i]);
    else
        return pair_of(numbers[2 * i], 2 * i + 1 < size ? numbers[2 * i + 1] : 0);
}

// to[element][row], with the elements along each row of `size` numbers.
template <typename E, typename T>
VPD_INLINE void load_columns(const T* from, int64_t from_stride, int64_t rows, int64_t size, float* to,
                             int64_t to_stride) {
    const bool aligned = E::WIDTH == 1 || (size % 2 == 0 && from_stride % 2 == 0);
    if (sizeof(T) * E::WIDTH == sizeof(float) && aligned) {  // elements are there already
        transpose(reinterpret_cast<const float*>(from), from_stride / E::WIDTH, rows, elements<E>(size), to, to_stride);
    } else {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < elements<E>(size); ++i)
                to[i * to_stride + r] = element<E>(from + r * from_stride, i, size);
    }
}

// Loads elements along the rows: of a row of V, or pairs of it and the next row, which is null after the last. to[size].
template <typename E, typename T>
VPD_INLINE void load_row(const T* from, const T* next, int64_t size, float* to) {
    int64_t d = 0;
    if constexpr (E::WIDTH == 1) {
        for (; d + LANES <= size; d += LANES) store(to + d, load(from + d));
        for (; d < size; ++d) to[d] = to_float(from[d]);
    } else {
        for (; d + LANES <= size; d += LANES)
            store(to + d, join_upper_halves(load(from + d), next ? load(next + d) : broadcast(0.0f)));
        for (; d < size; ++d) to[d] = pair_of(from[d], next ? next[d] : 0);
    }
}

template <typename E>
VPD_INLINE void flip_signs(float* numbers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, numbers + i, sizeof bits);
        numbers[i] = from_bits(bits ^ (E::WIDTH == 2 ? 0x80008000u : 0x80000000u));
    }
}

// to[element][query] for a tile of queries, zero beyond the first `count`. A negative scale becomes a sign of q, so that the
// largest score stays the largest.
template <typename E, typename T>
VPD_INLINE void load_queries(const T* queries, int64_t stride, int64_t count, int64_t dim, float scale, float* to,
                             int64_t tile) {
    load_columns<E>(queries, stride, count, dim, to, tile);
    for (int64_t i = 0; i < elements<E>(dim) && count < tile; ++i)
        for (int64_t r = count; r < tile; ++r) to[i * tile + r] = 0.0f;
    if (scale < 0) flip_signs<E>(to, elements<E>(dim) * tile);
}

// columns[d][row] -> to[row][d]; scratch: rows * size floats.
template <typename T>
VPD_INLINE void store_columns(const float* columns, int64_t stride, int64_t rows, int64_t size, float* scratch, T* to,
                              int64_t to_stride) {
    if constexpr (sizeof(T) == sizeof(float)) {
        transpose(columns, stride, size, rows, to, to_stride);
    } else {
        transpose(columns, stride, size, rows, scratch, size);
        for (int64_t r = 0; r < rows; ++r, scratch += size, to += to_stride) {
            int64_t d = 0;
            for (; d + LANES <= size; d += LANES) store(to + d, load(scratch + d));
            for (; d < size; ++d) to[d] = to_bf16(scratch[d]);
        }
    }
}

// Scores [token][query] -> exp2(factor * (score - maximum of the query)), for 16 queries. Returns one over their sums.
VPD_INLINE f32x16 exponentiate(float* scores, int64_t tile, int64_t tokens, f32x16 factor) {
    f32x16 maximum = load(scores), other = maximum;  // two, because one would wait for itself
    for (int64_t l = 0; l + 1 < tokens; l += 2) {
        maximum = max(load(scores + l * tile), maximum);
        other = max(load(scores + (l + 1) * tile), other);
    }
    maximum = max(max(load(scores + (tokens - 1) * tile), maximum), other);
    f32x16 sum = broadcast(0.0f);
    for (int64_t l = 0; l < tokens;) {
        f32x16 part = broadcast(0.0f);  // sums of sums: the rounding of thousands of terms would add up
        for (const int64_t end = l + 64 < tokens ? l + 64 : tokens; l < end; ++l) {
            const f32x16 p = exp2_of_nonpositive(multiply(factor, subtract(load(scores + l * tile), maximum)));
            store(scores + l * tile, p);
            part = add(part, p);
        }
        sum = add(sum, part);
    }
    return divide(broadcast(1.0f), sum);
}

}  // namespace
}  // namespace vpd::VPD_ISA
