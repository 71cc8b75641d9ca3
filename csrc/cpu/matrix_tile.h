// The micro-kernel of matrix products: a tile of sums stays in the registers, its left factors are broadcast.
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

// What one 32-bit lane holds of the summed dimension. Every level reads the same layout, so that packed weights do not
// depend on the machine; without the instruction a level computes the same products in more steps.
struct Single {  // one float32
    static constexpr int WIDTH = 1;  // numbers in an element
    VPD_INLINE F16 multiply_add(F16 a, F16 b, F16 sum) { return VPD_ISA::multiply_add(a, b, sum); }
};

struct Pair {  // two bfloat16
    static constexpr int WIDTH = 2;
#if defined(__AVX512BF16__)
    VPD_INLINE F16 multiply_add(F16 a, F16 b, F16 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else
    VPD_INLINE F16 multiply_add(F16 a, F16 b, F16 sum) {
        sum = VPD_ISA::multiply_add(low_bf16(a), low_bf16(b), sum);
        return VPD_ISA::multiply_add(high_bf16(a), high_bf16(b), sum);
    }
#endif
};

// Four 8-bit integers, unsigned in a and signed in b; the sums are int32 in the lanes of a float vector, and exact.
struct Quad {
    static constexpr int WIDTH = 4;
    VPD_INLINE F16 multiply_add(F16 a, F16 b, F16 sum) { return dot_4x8(a, b, sum); }
};

template <typename E>
constexpr int64_t elements(int64_t numbers) {
    return (numbers + E::WIDTH - 1) / E::WIDTH;
}

// Factors that are broadcast: element i of row r is data[r * row + i * step].
struct Factors {
    const float* data;
    int64_t row, step;
};

// sum[ROWS][columns] += a[ROWS][size] * b[size][columns] for COLUMNS_ vectors out of `width` columns.
template <typename E, int ROWS, int COLUMNS_>
VPD_INLINE void accumulate(Factors a, const float* b, int64_t size, int64_t width, F16 (&sum)[ROWS][COLUMNS_]) {
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
}

// What becomes of 16 sums, of one row and the columns from `column` on, before they are stored: nothing.
struct Unchanged {
    VPD_INLINE F16 finish(F16 sum, int64_t, int64_t) { return sum; }
};

// c[ROWS][columns] (+)= a[ROWS][size] * b[size][columns] for COLUMNS_ vectors out of `width` columns, finished.
template <typename E, int ROWS, int COLUMNS_, typename Finish>
void multiply_block(Factors a, const float* b, int64_t size, float* c, int64_t width, bool add, const Finish& finish,
                    int64_t row, int64_t column) {
    F16 sum[ROWS][COLUMNS_];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS_; ++j) sum[r][j] = add ? load(c + r * width + j * LANES) : broadcast(0.0f);
    accumulate<E>(a, b, size, width, sum);
#if defined(__AVX512F__)
    // Ends the life of the loop's registers: GCC would choose them to suit `finish`, and spill sums within the loop.
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS_; ++j) asm("" : "+v"(sum[r][j]));
#endif
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS_; ++j)
            store(c + r * width + j * LANES, finish.finish(sum[r][j], row + r, column + j * LANES));
}

// multiply_block for a number of rows known at run time only, at most ROWS.
template <typename E, int COLUMNS_, typename Finish = Unchanged, int ROWS = MOST_ROWS>
VPD_INLINE void multiply_rows(int64_t rows, Factors a, const float* b, int64_t size, float* c, int64_t width, bool add,
                              const Finish& finish = Finish(), int64_t row = 0, int64_t column = 0) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS)
            return multiply_rows<E, COLUMNS_, Finish, ROWS - 1>(rows, a, b, size, c, width, add, finish, row, column);
    }
    multiply_block<E, ROWS, COLUMNS_>(a, b, size, c, width, add, finish, row, column);
}

// c[rows][width] (+)= a[rows][size] * b[size][width], finished; the width is a multiple of 16.
template <typename E, typename Finish = Unchanged>
void multiply(int64_t rows, Factors a, const float* b, int64_t size, float* c, int64_t width, bool add = false,
              const Finish& finish = Finish()) {
    const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t block = 0; block < blocks; ++block) {  // of equal heights, as far as possible
        const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
        const Factors from{a.data + first * a.row, a.row, a.step};
        float* to = c + first * width;
        int64_t column = 0;
        for (; column + COLUMNS * LANES <= width; column += COLUMNS * LANES)
            multiply_rows<E, COLUMNS>(count, from, b + column, size, to + column, width, add, finish, first, column);
        if (COLUMNS > 1 && column < width)
            multiply_rows<E, 1>(count, from, b + column, size, to + column, width, add, finish, first, column);
    }
}

}  // namespace
}  // namespace vpd::VPD_ISA
