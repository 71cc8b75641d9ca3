// csrc/cuda/primitives.cuh on the CPU. Every thread of a block (of all blocks of a cluster) is a fiber; instructions of a
// whole warp run when its last thread arrives. Shared memory starts as NaN and an asynchronous copy leaves NaN until it is
// waited for; addresses in global memory must lie in a tensor that the test announced.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

struct uint4 {
    uint32_t x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the running thread.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();

namespace cuda_emulation {

void check_global(const void* address, size_t bytes, bool write);
float bfloat16_to_float(uint16_t bits);
float float16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float x);
uint16_t float_to_float16(float x);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t));
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);

}  // namespace cuda_emulation

namespace vpd::device {

struct Bfloat16 {
    uint16_t bits;
    Bfloat16() = default;
    explicit Bfloat16(float x) : bits(cuda_emulation::float_to_bfloat16(x)) {}
    static float to_float(uint16_t bits) { return cuda_emulation::bfloat16_to_float(bits); }
};
struct Float16 {
    uint16_t bits;
    Float16() = default;
    explicit Float16(float x) : bits(cuda_emulation::float_to_float16(x)) {}
    static float to_float(uint16_t bits) { return cuda_emulation::float16_to_float(bits); }
};

unsigned char* dynamic_shared();

template <typename T>
T load_global(const T* p) {
    cuda_emulation::check_global(p, sizeof(T), false);
    return *p;
}
template <typename T>
void store_global(T* p, T value) {
    cuda_emulation::check_global(p, sizeof(T), true);
    *p = value;
}

void async_copy_16(void* shared, const void* global, bool valid);
void async_commit();
void wait_for_copies(int pending);
template <int PENDING>
void async_wait() {
    wait_for_copies(PENDING);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { cuda_emulation::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { cuda_emulation::load_matrices(r, row, true); }

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cuda_emulation::multiply_add(c, a, b0, b1, T::to_float);
}
template <typename T>
uint32_t pack(float low, float high) {
    return T(low).bits | uint32_t(T(high).bits) << 16;
}
template <typename T>
T from_float(float x) {
    return T(x);
}

inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
float shuffle_xor(float x, int mask);

void cluster_arrive();
void cluster_wait();
float load_from_cluster(const float* shared, uint32_t rank);

}  // namespace vpd::device
