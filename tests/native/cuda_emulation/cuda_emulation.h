// csrc/cuda/primitives.cuh on the CPU. Every thread of a block (of all blocks of a cluster) is a fiber; instructions of a
// whole warp run when its last thread arrives. Shared memory starts as NaN and an asynchronous copy leaves NaN until it is
// waited for; addresses in global memory must lie in a tensor that the test announced.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline

struct alignas(8) uint2 {
    uint32_t x, y;
};

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
uint8_t float_to_float8(float x);  // e4m3fn; numbers beyond 448 become 448
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t));
void multiply_add_integers(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);

// Formats of the factors of a warpgroup's products.
enum class Format { int8, float8_e4m3fn, bfloat16, float16 };
void multiply_add_wide(Format format, void* sums, int columns, uint64_t left, uint64_t right, bool accumulate);
// The left factor in registers, 16 rows per warp; the right one by columns.
void multiply_add_from_registers(Format format, void* sums, int columns, const uint32_t (&left)[4], uint64_t right,
                                 bool accumulate);
void wait_for_products(int pending);
void load_box(void* shared, const CUtensorMap& map, uint64_t* barrier, const int (&place)[5], unsigned mask = 0);

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
void multiply_add(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(std::is_same_v<T, int8_t>);
    cuda_emulation::multiply_add_integers(c, a, b0, b1);
}
template <typename T>
uint32_t pack(float low, float high) {
    return T(low).bits | uint32_t(T(high).bits) << 16;
}
template <typename T>
T from_float(float x) {
    return T(x);
}

template <typename T>
float to_float(T x) {
    return T::to_float(x.bits);
}
template <typename T>
void unpack(uint32_t packed, float& low, float& high) {
    low = T::to_float(uint16_t(packed)), high = T::to_float(uint16_t(packed >> 16));
}

inline float multiply_rounded(float x, float y) { return x * y; }
inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float reciprocal_fast(float x) {
    const float y = 1.0f / x;
    return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline float larger_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y); }
inline uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}
inline uint32_t pack_float8(float a, float b, float c, float d) {
    return low_bytes(cuda_emulation::float_to_float8(a), cuda_emulation::float_to_float8(b),
                     cuda_emulation::float_to_float8(c), cuda_emulation::float_to_float8(d));
}
void sync_warp();
inline int same_in_warp(int x) { return x; }
bool any_in_warp(bool x);
float shuffle_xor(float x, int mask);

void cluster_arrive();
void cluster_wait();
float load_from_cluster(const float* shared, uint32_t rank);

// csrc/cuda/hopper.cuh
using TensorMap = CUtensorMap;
struct Float8 {};
uint32_t shared_address(const void* p);
void barrier_init(uint64_t* barrier, unsigned arrivals);
void barrier_init_done();
void barrier_expect(uint64_t* barrier, unsigned bytes);
void barrier_arrive(uint64_t* barrier);
void barrier_wait(uint64_t* barrier, unsigned parity);
void sync_threads(int barrier, int threads);
bool elected();
void give_registers_to(int count);
void take_registers_to(int count);
template <int COUNT>
void give_registers() {
    give_registers_to(COUNT);
}
template <int COUNT>
void take_registers() {
    take_registers_to(COUNT);
}
unsigned rank_in_cluster();
void barrier_arrive_at(uint64_t* barrier, unsigned rank);
inline void load_box_to_all(void* shared, const TensorMap& map, uint64_t* barrier, int x0, int x1, uint16_t mask) {
    cuda_emulation::load_box(shared, map, barrier, {x0, x1, 0, 0, 0}, mask);
}
void store_box(const void* shared, const TensorMap& map, int x0, int x1, int x2, int x3);
void store_commit();
void store_wait();
void stores_done();
inline void prefetch_tensor_map(const TensorMap&) {}
inline void load_box(void* shared, const TensorMap& map, uint64_t* barrier, int x0, int x1) {
    cuda_emulation::load_box(shared, map, barrier, {x0, x1, 0, 0, 0});
}
inline void load_box(void* shared, const TensorMap& map, uint64_t* barrier, int x0, int x1, int x2, int x3) {
    cuda_emulation::load_box(shared, map, barrier, {x0, x1, x2, x3, 0});
}
template <typename Sum, int COUNT>
void hold(Sum (&)[COUNT]) {}
void wgmma_begin();
void wgmma_commit();
template <int PENDING, typename Sum, int COUNT>
void wgmma_wait(Sum (&)[COUNT]) {
    cuda_emulation::wait_for_products(PENDING);
}
template <int PENDING, typename Sum, int TILES, int COUNT>
void wgmma_wait(Sum (&)[TILES][COUNT]) {
    cuda_emulation::wait_for_products(PENDING);
}
template <typename T>
constexpr cuda_emulation::Format format_of() {
    if constexpr (std::is_same_v<T, int8_t>) return cuda_emulation::Format::int8;
    else if constexpr (std::is_same_v<T, Bfloat16>) return cuda_emulation::Format::bfloat16;
    else if constexpr (std::is_same_v<T, Float16>) return cuda_emulation::Format::float16;
    else return cuda_emulation::Format::float8_e4m3fn;
}
template <typename T, typename Sum, int COUNT>
void multiply_add_wide(Sum (&sums)[COUNT], uint64_t left, uint64_t right, bool accumulate) {
    cuda_emulation::multiply_add_wide(format_of<T>(), sums, 2 * COUNT, left, right, accumulate);
}
template <typename T, int COUNT>
void multiply_add_from_registers(float (&sums)[COUNT], const uint32_t (&left)[4], uint64_t right, bool accumulate) {
    cuda_emulation::multiply_add_from_registers(format_of<T>(), sums, 2 * COUNT, left, right, accumulate);
}

}  // namespace vpd::device
