// Operands of a warpgroup's matrix instructions beyond those of hopper.cuh: right ones that lie by columns, and left ones in
// registers.
#pragma once

#include "cuda/hopper.cuh"

namespace vpd::device {

constexpr int LINE_BYTES = 128;          // of what is swizzled; lines follow each other
constexpr int SWIZZLE_ALIGNMENT = 1024;  // of the first line, and bytes of eight lines

// The descriptor of swizzled lines. If a line is 64 numbers of K, lines are rows; if a line is 64 columns of a right operand
// at one number of K, columns 64 further are `panel_bytes` behind.
__device__ inline uint64_t line_descriptor(const void* shared, int panel_bytes = 16) {
    return uint64_t(shared_address(shared) >> 4 & 0x3fff) | uint64_t(panel_bytes >> 4) << 16 |
           uint64_t(SWIZZLE_ALIGNMENT >> 4) << 32 | uint64_t(1) << 62;
}

#ifdef __CUDACC__

// clang-format off
#define VPD_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VPD_SUMS_20(i) \
    VPD_SUMS_4(i), VPD_SUMS_4(i + 4), VPD_SUMS_4(i + 8), VPD_SUMS_4(i + 12), VPD_SUMS_4(i + 16)
#define VPD_NAMES_20 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define VPD_NAMES_40 \
    VPD_NAMES_20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define VPD_NAMES_80                                                                                                  \
    VPD_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "   \
    "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define VPD_FROM_REGISTERS(shape, types, names, a0, a1, a2, a3, right, accumulate, ...)                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" accumulate ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned." shape types " {" names "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" \
                 right ", p, 1, 1, 1;\n}\n"                                                                        \
                 : __VA_ARGS__                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(before)))
#define VPD_FROM_REGISTERS_OF_COUNT(types)                                                                          \
    if constexpr (COUNT == 20)                                                                                      \
        VPD_FROM_REGISTERS("m64n40k16", types, VPD_NAMES_20, "20", "21", "22", "23", "24", "25", VPD_SUMS_20(0));         \
    else if constexpr (COUNT == 40)                                                                                 \
        VPD_FROM_REGISTERS("m64n80k16", types, VPD_NAMES_40, "40", "41", "42", "43", "44", "45", VPD_SUMS_20(0),          \
                           VPD_SUMS_20(20));                                                                        \
    else                                                                                                            \
        VPD_FROM_REGISTERS("m64n160k16", types, VPD_NAMES_80, "80", "81", "82", "83", "84", "85", VPD_SUMS_20(0),         \
                           VPD_SUMS_20(20), VPD_SUMS_20(40), VPD_SUMS_20(60))
// clang-format on

// sums (64 x 2 COUNT) += left (64 x 16) right (16 x 2 COUNT) of 16-bit numbers. left: in registers, in the layout of
// mma.sync's fragments, 16 rows per warp; right: in shared memory, a line of columns for each number of K. The registers
// must not change before the product is waited for. before: whether the sums so far count.
template <typename T, int COUNT>
__device__ inline void multiply_add_from_registers(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, bool before) {
    static_assert(COUNT == 20 || COUNT == 40 || COUNT == 80);
#if VPD_HOPPER
    if constexpr (std::is_same_v<T, Bfloat16>) {
        VPD_FROM_REGISTERS_OF_COUNT(".f32.bf16.bf16");
    } else {
        static_assert(std::is_same_v<T, Float16>);
        VPD_FROM_REGISTERS_OF_COUNT(".f32.f16.f16");
    }
#endif
}

#undef VPD_SUMS_4
#undef VPD_SUMS_20
#undef VPD_NAMES_20
#undef VPD_NAMES_40
#undef VPD_NAMES_80
#undef VPD_FROM_REGISTERS
#undef VPD_FROM_REGISTERS_OF_COUNT

#endif

}  // namespace vpd::device
