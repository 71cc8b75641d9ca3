// What sm_90 adds to primitives.cuh: barriers in shared memory that count bytes, copies of boxes by TMA, and matrix
// instructions of a warpgroup. One function per instruction; elsewhere than on sm_90a they do nothing and nothing calls
// them. The emulation on the CPU has the same functions.
#pragma once

#include "cuda/primitives.cuh"

#ifdef __CUDACC__

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define VPD_HOPPER 1
#else
#define VPD_HOPPER 0
#endif

namespace vpd::device {

using TensorMap = CUtensorMap;

// A barrier's phase ends when `arrivals` threads have arrived and all announced bytes have come.
__device__ inline void barrier_init(uint64_t* barrier, unsigned arrivals) {
#if VPD_HOPPER
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}
// Lets TMA see barriers that were initialised; a __syncthreads must follow for the other threads.
__device__ inline void barrier_init_done() {
#if VPD_HOPPER
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}
// Arrives, and announces bytes.
__device__ inline void barrier_expect(uint64_t* barrier, unsigned bytes) {
#if VPD_HOPPER
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
#if VPD_HOPPER
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// Waits until the phase of this parity has ended: 0 for the first, third, ... Built with VPD_BOUNDED_WAITS, a wait that
// lasts longer than MAX_WAIT nanoseconds is an error of the kernel, which otherwise would never end.
#ifdef VPD_BOUNDED_WAITS
constexpr unsigned long long MAX_WAIT = 2'000'000'000;
#endif
__device__ inline void barrier_wait(uint64_t* barrier, unsigned parity) {
#if VPD_HOPPER
    unsigned done = 0;
#ifdef VPD_BOUNDED_WAITS
    unsigned long long begin = 0;
#endif
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
#ifdef VPD_BOUNDED_WAITS
        unsigned long long now;
        asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(now));
        if (!begin) begin = now;
        if (now - begin > MAX_WAIT) __trap();
#endif
    }
#endif
}

// Whether this thread is the one that a warp, all of which calls this, elects: always the same. The compiler then knows
// that what depends on it is done by one thread.
__device__ inline bool elected() {
    unsigned chosen = 1;
#if VPD_HOPPER
    asm volatile(
        "{\n.reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(chosen));
#endif
    return chosen != 0;
}

// A number of threads, whole warps, wait for each other at one of the hardware's barriers; 0 is that of __syncthreads.
__device__ inline void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// Moves registers between warpgroups, all of whose threads call one of these: each thread then has COUNT of them.
template <int COUNT>
__device__ inline void give_registers() {
#if VPD_HOPPER
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ inline void take_registers() {
#if VPD_HOPPER
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
#endif
}

// Gets a map, a parameter of the kernel, to where the first copy will look for it.
__device__ inline void prefetch_tensor_map(const TensorMap& map) {
#if VPD_HOPPER
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
#endif
}

// Copies a box of a tensor into shared memory and tells the barrier its bytes; zeros where the box leaves the tensor.
__device__ inline void load_box(void* shared, const TensorMap& map, uint64_t* barrier, int x0, int x1) {
#if VPD_HOPPER
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::
            "r"(shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1)
        : "memory");
#endif
}
__device__ inline void load_box(void* shared, const TensorMap& map, uint64_t* barrier, int x0, int x1, int x2, int x3) {
#if VPD_HOPPER
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];\n" ::"r"(shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
        : "memory");
#endif
}

// Copies a box from shared memory to a tensor, all but what is outside of it, when stores_done has made it visible; part of
// the thread's open group of stores.
__device__ inline void store_box(const void* shared, const TensorMap& map, int x0, int x1, int x2, int x3) {
#if VPD_HOPPER
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(&map),
                 "r"(shared_address(shared)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
#endif
}
__device__ inline void store_commit() {
#if VPD_HOPPER
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
#endif
}
// Waits until all of this thread's stores have read shared memory.
__device__ inline void store_wait() {
#if VPD_HOPPER
    asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
#endif
}
// Lets asynchronous instructions see what this thread has stored in shared memory.
__device__ inline void stores_done() {
#if VPD_HOPPER
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

__device__ inline unsigned rank_in_cluster() {
    unsigned rank = 0;
#if VPD_HOPPER
    asm volatile("mov.u32 %0, %cluster_ctarank;\n" : "=r"(rank));
#endif
    return rank;
}
// As load_box, to the same place in all blocks of the cluster that the mask names, whose barriers get the bytes.
__device__ inline void load_box_to_all(void* shared, const TensorMap& map, uint64_t* barrier, int x0, int x1,
                                       uint16_t mask) {
#if VPD_HOPPER
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4}], [%2], %5;\n" ::"r"(shared_address(shared)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "h"(mask)
        : "memory");
#endif
}
// Arrives at the barrier that block `rank` of the cluster has where this block has `barrier`.
__device__ inline void barrier_arrive_at(uint64_t* barrier, unsigned rank) {
#if VPD_HOPPER
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
#endif
}

// --- matrix instructions of a warpgroup ------------------------------------------------------------------------------
// They run asynchronously: begin, some multiply_add_wide, commit ends a group; wgmma_wait until at most PENDING groups
// are left, with which the sums and the operands in shared memory may be touched again.

__device__ inline void wgmma_begin() {
#if VPD_HOPPER
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#if VPD_HOPPER
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
// The compiler must move no use of the sums over these.
template <int COUNT>
__device__ inline void hold(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int COUNT>
__device__ inline void hold(int32_t (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}
template <int PENDING, typename Sum, int COUNT>
__device__ inline void wgmma_wait(Sum (&sums)[COUNT]) {
#if VPD_HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
    hold(sums);
#endif
}
template <int PENDING, typename Sum, int TILES, int COUNT>
__device__ inline void wgmma_wait(Sum (&sums)[TILES][COUNT]) {
#if VPD_HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < TILES; ++i) hold(sums[i]);
#endif
}

// clang-format off
#define VPD_SUMS_8(c, d, i) \
    c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define VPD_SUMS_16(c, d, i) VPD_SUMS_8(c, d, i), VPD_SUMS_8(c, d, i + 8)
#define VPD_SUMS_32(c, d, i) VPD_SUMS_16(c, d, i), VPD_SUMS_16(c, d, i + 16)
#define VPD_SUMS_64(c, d, i) VPD_SUMS_32(c, d, i), VPD_SUMS_32(c, d, i + 32)
#define VPD_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VPD_NAMES_64 \
    VPD_NAMES_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VPD_NAMES_40 VPD_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VPD_NAMES_80 \
    VPD_NAMES_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define VPD_NAMES_128 \
    VPD_NAMES_80 \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, " \
    "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
    "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// `suffix`: what follows the predicate that says whether the sums so far count.
#define VPD_WGMMA(shape, types, names, left, right, accumulate, suffix, ...)                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" accumulate ", 0;\n"                                  \
                 "wgmma.mma_async.sync.aligned." shape types " {" names "}, %" left ", %" right ", p" suffix \
                 ";\n}\n"                                                                                  \
                 : __VA_ARGS__                                                                             \
                 : "l"(a), "l"(b), "r"(int(before)))
#define VPD_WGMMA_OF_COUNT(depth, types, suffix, c)                                                                  \
    if constexpr (COUNT == 32)                                                                                      \
        VPD_WGMMA("m64n64" depth, types, VPD_NAMES_32, "32", "33", "34", suffix, VPD_SUMS_32(c, d, 0));              \
    else if constexpr (COUNT == 40)                                                                                 \
        VPD_WGMMA("m64n80" depth, types, VPD_NAMES_40, "40", "41", "42", suffix, VPD_SUMS_32(c, d, 0),               \
                  VPD_SUMS_8(c, d, 32));                                                                            \
    else if constexpr (COUNT == 64)                                                                                 \
        VPD_WGMMA("m64n128" depth, types, VPD_NAMES_64, "64", "65", "66", suffix, VPD_SUMS_64(c, d, 0));             \
    else if constexpr (COUNT == 80)                                                                                 \
        VPD_WGMMA("m64n160" depth, types, VPD_NAMES_80, "80", "81", "82", suffix, VPD_SUMS_64(c, d, 0),              \
                  VPD_SUMS_16(c, d, 64));                                                                           \
    else                                                                                                            \
        VPD_WGMMA("m64n256" depth, types, VPD_NAMES_128, "128", "129", "130", suffix, VPD_SUMS_64(c, d, 0),          \
                  VPD_SUMS_64(c, d, 64))
#define VPD_FLOAT(x) "+f"(x)
#define VPD_INTEGER(x) "+r"(x)
// clang-format on

// sums (64 x 2 COUNT) += left (64 x 32 bytes) right^T (2 COUNT x 32 bytes), both in shared memory as the descriptors a
// and b say; thread `lane` of warp w has rows 16 w + lane / 4 and 8 more, in the layout of mma.sync's fragments side by
// side. before: whether the sums so far count.
template <typename T, typename Sum, int COUNT>
__device__ inline void multiply_add_wide(Sum (&d)[COUNT], uint64_t a, uint64_t b, bool before) {
    static_assert(COUNT == 32 || COUNT == 40 || COUNT == 64 || COUNT == 80 || COUNT == 128);
#if VPD_HOPPER
    if constexpr (std::is_same_v<T, int8_t>) {
        VPD_WGMMA_OF_COUNT("k32", ".s32.s8.s8", "", VPD_INTEGER);
    } else if constexpr (std::is_same_v<T, Float8>) {
        VPD_WGMMA_OF_COUNT("k32", ".f32.e4m3.e4m3", ", 1, 1", VPD_FLOAT);
    } else if constexpr (std::is_same_v<T, Bfloat16>) {
        VPD_WGMMA_OF_COUNT("k16", ".f32.bf16.bf16", ", 1, 1, 0, 0", VPD_FLOAT);
    } else {
        static_assert(std::is_same_v<T, Float16>);
        VPD_WGMMA_OF_COUNT("k16", ".f32.f16.f16", ", 1, 1, 0, 0", VPD_FLOAT);
    }
#endif
}

#undef VPD_SUMS_8
#undef VPD_SUMS_16
#undef VPD_SUMS_32
#undef VPD_SUMS_64
#undef VPD_NAMES_32
#undef VPD_NAMES_40
#undef VPD_NAMES_64
#undef VPD_NAMES_80
#undef VPD_NAMES_128
#undef VPD_WGMMA
#undef VPD_WGMMA_OF_COUNT
#undef VPD_FLOAT
#undef VPD_INTEGER

}  // namespace vpd::device

#else
#define VPD_HOPPER 1
#endif
