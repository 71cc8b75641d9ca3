// The GEMM micro-kernel: a tile of sums stays in the registers, elements of the left operand are broadcast.
#pragma once

#include "cpu/simd.h"

namespace vpd::VPD_ISA {
namespace {

// Sums of the micro-kernel: MAX_ROWS x COLUMNS vectors, as many as the registers hold.
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12, COLUMNS = 2;
#elif defined(__AVX2__)
constexpr int MAX_ROWS = 6, COLUMNS = 1;
#else
constexpr int MAX_ROWS = 3, COLUMNS = 1;
#endif

// What one 32-bit lane holds of the summed dimension. Every level reads the same layout, so that packed weights do not
// depend on the machine; without the instruction a level computes the same products in more steps.
struct F32 {                         // one float32
    static constexpr int WIDTH = 1;  // numbers in an element
    VPD_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 sum) { return VPD_ISA::multiply_add(a, b, sum); }
};

struct Bf16x2 {  // two bfloat16
    static constexpr int WIDTH = 2;
#if defined(__AVX512BF16__)
    VPD_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
#else
    VPD_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 sum) {
        sum = VPD_ISA::multiply_add(low_bf16(a), low_bf16(b), sum);
        return VPD_ISA::multiply_add(high_bf16(a), high_bf16(b), sum);
    }
#endif
};

// Four 8-bit integers, unsigned in a and signed in b; the sums are int32 in the lanes of a float vector, and exact.
struct Int8x4 {
    static constexpr int WIDTH = 4;
    VPD_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 sum) { return dot_4x8(a, b, sum); }
};

template <typename E>
constexpr int64_t elements(int64_t numbers) {
    return ceil_divide(numbers, E::WIDTH);
}

// The left operand, whose elements are broadcast: element i of row r is data[r * row + i * step].
struct LeftOperand {
    const float* data;
    int64_t row, step;
};

// sum[ROWS][columns] += a[ROWS][size] * b[size][columns] for COLUMN_VECTORS vectors out of `width` columns.
template <typename E, int ROWS, int COLUMN_VECTORS>
VPD_INLINE void accumulate(LeftOperand a, const float* b, int64_t size, int64_t width,
                           f32x16 (&sum)[ROWS][COLUMN_VECTORS]) {
    for (int64_t i = 0; i < size; ++i, a.data += a.step, b += width) {
        f32x16 column[COLUMN_VECTORS];
#pragma GCC unroll 2
        for (int j = 0; j < COLUMN_VECTORS; ++j) column[j] = load(b + j * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const f32x16 factor = broadcast(a.data[r * a.row]);
#pragma GCC unroll 2
            for (int j = 0; j < COLUMN_VECTORS; ++j) sum[r][j] = E::multiply_add(factor, column[j], sum[r][j]);
        }
    }
}

// The epilogue of 16 sums, of one row and the columns from `column` on, before they are stored: none.
struct NoEpilogue {
    VPD_INLINE f32x16 apply(f32x16 sum, int64_t, int64_t) { return sum; }
};

// c[ROWS][columns] (+)= a[ROWS][size] * b[size][columns] for COLUMN_VECTORS vectors out of `width` columns, after the epilogue.
template <typename E, int ROWS, int COLUMN_VECTORS, typename Epilogue>
void multiply_block(LeftOperand a, const float* b, int64_t size, float* c, int64_t width, bool add,
                    const Epilogue& epilogue, int64_t row, int64_t column) {
    f32x16 sum[ROWS][COLUMN_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMN_VECTORS; ++j) sum[r][j] = add ? load(c + r * width + j * LANES) : broadcast(0.0f);
    accumulate<E>(a, b, size, width, sum);
#if defined(__AVX512F__)
    // Ends the life of the loop's registers: GCC would choose them to suit `epilogue`, and spill sums within the loop.
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMN_VECTORS; ++j) asm("" : "+v"(sum[r][j]));
#endif
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMN_VECTORS; ++j)
            store(c + r * width + j * LANES, epilogue.apply(sum[r][j], row + r, column + j * LANES));
}

// multiply_block for a number of rows known at run time only, at most ROWS.
template <typename E, int COLUMN_VECTORS, typename Epilogue = NoEpilogue, int ROWS = MAX_ROWS>
VPD_INLINE void multiply_rows(int64_t rows, LeftOperand a, const float* b, int64_t size, float* c, int64_t width,
                              bool add, const Epilogue& epilogue = Epilogue(), int64_t row = 0, int64_t column = 0) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS)
            return multiply_rows<E, COLUMN_VECTORS, Epilogue, ROWS - 1>(rows, a, b, size, c, width, add, epilogue, row,
                                                                        column);
    }
    multiply_block<E, ROWS, COLUMN_VECTORS>(a, b, size, c, width, add, epilogue, row, column);
}

// c[rows][width] (+)= a[rows][size] * b[size][width], after the epilogue; the width is a multiple of 16.
template <typename E, typename Epilogue = NoEpilogue>
void multiply(int64_t rows, LeftOperand a, const float* b, int64_t size, float* c, int64_t width, bool add = false,
              const Epilogue& epilogue = Epilogue()) {
    const int64_t blocks = ceil_divide(rows, MAX_ROWS);
    for (int64_t block = 0; block < blocks; ++block) {  // of equal heights, as far as possible
        const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
        const LeftOperand from{a.data + first * a.row, a.row, a.step};
        float* to = c + first * width;
        int64_t column = 0;
        for (; column + COLUMNS * LANES <= width; column += COLUMNS * LANES)
            multiply_rows<E, COLUMNS>(count, from, b + column, size, to + column, width, add, epilogue, first, column);
        if (COLUMNS > 1 && column < width)
            multiply_rows<E, 1>(count, from, b + column, size, to + column, width, add, epilogue, first, column);
    }
}

}  // namespace
}  // namespace vpd::VPD_ISA
