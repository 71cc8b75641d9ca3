// Sizes that kernels and bindings agree on, and how they are rounded.
//
// Functions are static: kernels are compiled once per instruction set level, and the linker must not share code of theirs.
#pragma once

#include <cstdint>

namespace vpd {

constexpr int64_t LANES = 16;  // 32-bit numbers in a vector of csrc/cpu/simd.h

static constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t padded(int64_t n) { return ceil_divide(n, LANES) * LANES; }

}  // namespace vpd
