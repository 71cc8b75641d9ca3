// What probes need beyond hopper.cuh: waits that end, clocks, matrix descriptors.
#pragma once

#include "cuda/hopper.cuh"

namespace vpd::probes {

using namespace device;

constexpr int LINE_BYTES = 128;

// The first address of dynamic shared memory that swizzled tiles may lie at.
__device__ inline unsigned char* aligned_shared() {
    unsigned char* const memory = dynamic_shared();
    return memory + (-shared_address(memory) & 1023);
}

#ifdef __CUDACC__

constexpr unsigned long long MAX_WAIT = 100'000'000;  // nanoseconds

__device__ inline long long clocks_now() { return clock64(); }

__device__ inline unsigned long long nanoseconds_now() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(now));
    return now;
}

// As barrier_wait, but gives up after MAX_WAIT. Returns whether the phase has ended.
__device__ inline bool barrier_wait_bounded(uint64_t* barrier, unsigned parity) {
#if VPD_HOPPER
    unsigned long long begin = 0;
    while (true) {
        unsigned done = 0;
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
        if (done) return true;
        const unsigned long long now = nanoseconds_now();
        if (!begin) begin = now;
        if (now - begin > MAX_WAIT) return false;
    }
#endif
    return false;
}

#else

inline long long clocks_now() { return 0; }
inline bool barrier_wait_bounded(uint64_t* barrier, unsigned parity) {
    barrier_wait(barrier, parity);
    return true;
}

#endif

// The matrix descriptor of lines of 128 bytes with their swizzle, groups of 8 lines `apart` bytes apart.
__device__ inline uint64_t descriptor_of(uint32_t address, uint32_t apart, unsigned base_offset) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(apart >> 4) << 32 |
           uint64_t(base_offset) << 49 | uint64_t(1) << 62;
}

}  // namespace vpd::probes
