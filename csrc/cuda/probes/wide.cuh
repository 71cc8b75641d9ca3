// Matrix instructions of a warpgroup with more columns than the product uses; hopper.cuh says how they are used.
#pragma once

#include "cuda/probes/bounded.cuh"

namespace vpd::probes {

#ifdef __CUDACC__

// clang-format off
#define VPD_C4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define VPD_C16(c, d, i) VPD_C4(c, d, i), VPD_C4(c, d, i + 4), VPD_C4(c, d, i + 8), VPD_C4(c, d, i + 12)
#define VPD_C64(c, d, i) VPD_C16(c, d, i), VPD_C16(c, d, i + 16), VPD_C16(c, d, i + 32), VPD_C16(c, d, i + 48)
#define VPD_N64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VPD_N80 VPD_N64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define VPD_N128 VPD_N80 \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, " \
    "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
    "%119, %120, %121, %122, %123, %124, %125, %126, %127"
#define VPD_WIDE(shape, types, names, left, right, suffix, ...)                                                   \
    asm volatile("wgmma.mma_async.sync.aligned." shape types " {" names "}, %" left ", %" right ", 1" suffix ";\n" \
                 : __VA_ARGS__ : "l"(a), "l"(b))
#define VPD_WIDE_OF_COUNT(depth, types, suffix, c)                                                                \
    if constexpr (COUNT == 64)                                                                                    \
        VPD_WIDE("m64n128" depth, types, VPD_N64, "64", "65", suffix, VPD_C64(c, d, 0));                          \
    else if constexpr (COUNT == 80)                                                                               \
        VPD_WIDE("m64n160" depth, types, VPD_N80, "80", "81", suffix, VPD_C64(c, d, 0), VPD_C16(c, d, 64));       \
    else                                                                                                          \
        VPD_WIDE("m64n256" depth, types, VPD_N128, "128", "129", suffix, VPD_C64(c, d, 0), VPD_C64(c, d, 64))
#define VPD_FLOAT(x) "+f"(x)
#define VPD_INTEGER(x) "+r"(x)
// clang-format on

// sums (64 x 2 COUNT) += left right^T, as multiply_add_wide; COUNT is 64, 80 or 128.
template <typename T, typename Sum, int COUNT>
__device__ inline void multiply_add_widest(Sum (&d)[COUNT], uint64_t a, uint64_t b) {
    static_assert(COUNT == 64 || COUNT == 80 || COUNT == 128);
#if VPD_HOPPER
    if constexpr (std::is_same_v<T, int8_t>) {
        VPD_WIDE_OF_COUNT("k32", ".s32.s8.s8", "", VPD_INTEGER);
    } else if constexpr (std::is_same_v<T, Float8>) {
        VPD_WIDE_OF_COUNT("k32", ".f32.e4m3.e4m3", ", 1, 1", VPD_FLOAT);
    } else {
        static_assert(std::is_same_v<T, Bfloat16>);
        VPD_WIDE_OF_COUNT("k16", ".f32.bf16.bf16", ", 1, 1, 0, 0", VPD_FLOAT);
    }
#endif
}

#undef VPD_C4
#undef VPD_C16
#undef VPD_C64
#undef VPD_N64
#undef VPD_N80
#undef VPD_N128
#undef VPD_WIDE
#undef VPD_WIDE_OF_COUNT
#undef VPD_FLOAT
#undef VPD_INTEGER

#else

template <typename T, typename Sum, int COUNT>
inline void multiply_add_widest(Sum (&d)[COUNT], uint64_t a, uint64_t b) {
    multiply_add_wide<T>(d, a, b, true);
}

#endif

// The matrix descriptor of lines of 128 bytes with their swizzle, groups of 8 lines `apart` bytes apart.
__device__ inline uint64_t descriptor_of(uint32_t address, uint32_t apart, unsigned base_offset) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(apart >> 4) << 32 |
           uint64_t(base_offset) << 49 | uint64_t(1) << 62;
}

}  // namespace vpd::probes
