// What a kernel needs beyond plain C++, one function per instruction. Without a CUDA compiler the same functions come from
// an emulation on the CPU, so that kernels written over them can be run and checked where there is no GPU.
#pragma once

#ifndef __CUDACC__
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace vpd::device {

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;
struct Float8 {};  // e4m3fn, on which nothing but matrix instructions computes

// The dynamic shared memory of the block.
__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

// Global memory goes through these, so that the emulation can check the addresses.
template <typename T>
__device__ inline T load_global(const T* p) {
    return *p;
}
template <typename T>
__device__ inline void store_global(T* p, T value) {
    *p = value;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, both aligned; zeros if not `valid`. Visible to the thread after async_wait, to
// the others after a barrier that follows it.
__device__ inline void async_copy_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// Ends a group of copies, which may be empty.
__device__ inline void async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits for all groups of this thread but the newest `PENDING`.
template <int PENDING>
__device__ inline void async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8, and gets elements
// (lane / 4, 2 * (lane % 4)) and the next of each; of the transposed matrices with load_matrices_transposed.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16x8, float32) += a (16x16) b (16x8), T being the type of the elements of a and b.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16x8, int32) += a (16x32) b (32x8) of int8.
template <typename T>
__device__ inline void multiply_add(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(std::is_same_v<T, int8_t>);
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to T, the first in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<Bfloat16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
template <>
__device__ inline uint32_t pack<Float16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <typename T>
__device__ inline T from_float(float x) {
    return T(x);
}
template <typename T>
__device__ inline float to_float(T x) {
    return float(x);
}
// The numbers of type T in the low and the high half.
template <typename T>
__device__ inline void unpack(uint32_t packed, float& low, float& high) {
    const uint16_t halves[] = {uint16_t(packed), uint16_t(packed >> 16)};
    low = to_float(reinterpret_cast<const T&>(halves[0])), high = to_float(reinterpret_cast<const T&>(halves[1]));
}

template <>
__device__ inline void unpack<Bfloat16>(uint32_t packed, float& low, float& high) {
    low = __uint_as_float(packed << 16), high = __uint_as_float(packed & 0xffff0000u);
}

// A product that is rounded before anything is added to it.
__device__ inline float multiply_rounded(float x, float y) { return __fmul_rn(x, y); }

// 2^x within 2 units in the last place; results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x within a unit in the last place; results below 2^-126 are 0.
__device__ inline float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
// The larger number, or NaN if one is NaN.
__device__ inline float larger_or_nan(float x, float y) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(larger) : "f"(x), "f"(y));
    return larger;
}
// The low bytes of four numbers, the first lowest.
__device__ inline uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
// Four floats rounded to e4m3fn, the first lowest; numbers beyond 448 become 448. From sm_89 on; elsewhere nothing calls it.
__device__ inline uint32_t pack_float8(float a, float b, float c, float d) {
    uint16_t low = 0, high = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(high) : "f"(d), "f"(c));
#endif
    return low | uint32_t(high) << 16;
}

__device__ inline void sync_warp() { __syncwarp(); }
// A number that all threads of a warp have, as one that the compiler knows to be the same.
__device__ inline int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// Whether any thread of the warp says so.
__device__ inline bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }
__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Clusters exist from sm_90 on; elsewhere nothing calls these.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
#endif
}
// The element that block `rank` of the cluster has where this block has *shared.
__device__ inline float load_from_cluster(const float* shared, uint32_t rank) {
    float value = 0.0f;
#if __CUDA_ARCH__ >= 900
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared_address(shared)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(remote) : "memory");
#endif
    return value;
}

}  // namespace vpd::device

#endif
