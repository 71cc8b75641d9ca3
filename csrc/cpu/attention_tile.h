// What the attention kernels share: how the elements of their matrices look, and the softmax of a tile of queries.
//
// The lanes of a vector are queries. So the numbers of a softmax lie in different vectors (nothing is reduced across
// lanes), tokens and head dimensions need no padding, and K and V are read where they are, as factors that are broadcast.
#pragma once

#include "cpu/matrix_tile.h"

namespace vpd::VPD_ISA {
namespace {

#if defined(__AVX512BF16__)
using Bf16 = Pair;
#else
using Bf16 = Single;  // widened while it is packed
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
