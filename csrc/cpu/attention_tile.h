// What the attention kernels share: the micro-kernel of their matrix products, and the softmax of a tile of queries.
//
// The lanes of a vector are queries. So the numbers of a softmax lie in different vectors (nothing is reduced across
// lanes), tokens and head dimensions need no padding, and K and V are read where they are, as factors that are broadcast.
#pragma once

#include "cpu/simd.h"

namespace vpd::VPD_ISA {
namespace {

// Sums of the micro-kernel: MOST_ROWS x COLUMNS vectors, as many as the registers hold.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12, COLUMNS = 2;
#elif defined(__AVX2__)
constexpr int MOST_ROWS = 6, COLUMNS = 1;
#else
constexpr int MOST_ROWS = 3, COLUMNS = 1;
#endif

struct Single {  // float32, or bfloat16 widened to it
    static constexpr int WIDTH = 1;  // numbers in an element
    VPD_INLINE F16 multiply_add(F16 a, F16 b, F16 sum) { return VPD_ISA::multiply_add(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Pair {
    static constexpr int WIDTH = 2;
    VPD_INLINE F16 multiply_add(F16 a, F16 b, F16 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#else
using Pair = Single;
#endif

template <typename E>
constexpr int64_t elements(int64_t numbers) {
    return (numbers + E::WIDTH - 1) / E::WIDTH;
}

// Factors that are broadcast: element i of row r is data[r * row + i * step].
struct Factors {
    const float* data;
    int64_t row, step;
};

// c[ROWS][columns] (+)= a[ROWS][size] * b[size][columns] for COLUMNS_ vectors out of `width` columns.
template <typename E, int ROWS, int COLUMNS_>
void multiply_block(Factors a, const float* b, int64_t size, float* c, int64_t width, bool add) {
    F16 sum[ROWS][COLUMNS_];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS_; ++j) sum[r][j] = add ? load(c + r * width + j * LANES) : broadcast(0.0f);
    for (int64_t i = 0; i < size; ++i, a.data += a.step, b += width) {
        F16 column[COLUMNS_];
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS_; ++j) column[j] = load(b + j * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const F16 factor = broadcast(a.data[r * a.row]);
#pragma GCC unroll 2
            for (int j = 0; j < COLUMNS_; ++j) sum[r][j] = E::multiply_add(factor, column[j], sum[r][j]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS_; ++j) store(c + r * width + j * LANES, sum[r][j]);
}

// multiply_block for a number of rows known at run time only, at most ROWS.
template <typename E, int COLUMNS_, int ROWS = MOST_ROWS>
VPD_INLINE void multiply_rows(int64_t rows, Factors a, const float* b, int64_t size, float* c, int64_t width,
                              bool add) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return multiply_rows<E, COLUMNS_, ROWS - 1>(rows, a, b, size, c, width, add);
    }
    multiply_block<E, ROWS, COLUMNS_>(a, b, size, c, width, add);
}

// c[rows][width] (+)= a[rows][size] * b[size][width]; the width is a multiple of 16.
template <typename E>
void multiply(int64_t rows, Factors a, const float* b, int64_t size, float* c, int64_t width, bool add = false) {
    const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t block = 0; block < blocks; ++block) {  // of equal heights, as far as possible
        const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
        const Factors from{a.data + first * a.row, a.row, a.step};
        float* to = c + first * width;
        int64_t column = 0;
        for (; column + COLUMNS * LANES <= width; column += COLUMNS * LANES)
            multiply_rows<E, COLUMNS>(count, from, b + column, size, to + column, width, add);
        if (COLUMNS > 1 && column < width) multiply_rows<E, 1>(count, from, b + column, size, to + column, width, add);
    }
}

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

// Scores [token][query] -> exp2(factor * (score - largest of the query)), for 16 queries. Returns one over their sums.
VPD_INLINE F16 exponentiate(float* scores, int64_t tile, int64_t tokens, F16 factor) {
    F16 most = load(scores), other = most;  // two, because one would wait for itself
    for (int64_t l = 0; l + 1 < tokens; l += 2) {
        most = max(load(scores + l * tile), most);
        other = max(load(scores + (l + 1) * tile), other);
    }
    most = max(max(load(scores + (tokens - 1) * tile), most), other);
    F16 sum = broadcast(0.0f);
    for (int64_t l = 0; l < tokens;) {
        F16 part = broadcast(0.0f);  // sums of sums: the rounding of thousands of terms would add up
        for (const int64_t end = l + 64 < tokens ? l + 64 : tokens; l < end; ++l) {
            const F16 p = exp2_of_nonpositive(multiply(factor, subtract(load(scores + l * tile), most)));
            store(scores + l * tile, p);
            part = add(part, p);
        }
        sum = add(sum, part);
    }
    return divide(broadcast(1.0f), sum);
}

}  // namespace
}  // namespace vpd::VPD_ISA
