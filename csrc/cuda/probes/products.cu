// How fast matrix instructions are without loads, and with copies to shared memory beside them.
#include "cuda/probes/bounded.cuh"
#include "cuda/probes/probes.h"
#include "cuda/tensor_map.h"

namespace vpd::probes {
namespace {

constexpr int WARPGROUP = 128, MULTIPLYING = 2 * WARPGROUP, THREADS = MULTIPLYING + 32, LEFT_LINES = 128;
constexpr int PARTS = 4;  // matrix instructions of a step of 128 bytes
constexpr int RING = 4;   // boxes that are copied meanwhile

template <typename T>
struct SumOf {
    using Type = float;
};
template <>
struct SumOf<int8_t> {
    using Type = int32_t;
};

// Copies boxes until a warpgroup is done, a few in any case. Returns how many have come, or -1 if a wait was given up.
__device__ inline int copy_meanwhile(const TensorMap& map, const Products& p, unsigned char* ring, uint64_t* filled,
                                     const volatile int* multiplying) {
    int64_t line = int64_t(blockIdx.x) * p.copy_lines * 7 % p.region;
    int begun = 0, came = 0;
    bool more = true;
    while (more || came < begun) {
        more = more && (begun < RING || *multiplying > 0);
        if (more) {
            const int stage = begun % RING;
            barrier_expect(filled + stage, unsigned(p.copy_lines * LINE_BYTES));
            load_box(ring + stage * p.copy_lines * LINE_BYTES, map, filled + stage, 0, int(line));
            ++begun;
            line += p.copy_lines;
            if (line >= p.region) line -= p.region;
        }
        if (begun - came == RING || (!more && came < begun)) {
            if (!barrier_wait_bounded(filled + came % RING, unsigned(came / RING) & 1)) return -1;
            ++came;
        }
    }
    return came;
}

template <typename T, int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
    multiply_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ Products p) {
#if VPD_HOPPER
    using Sum = typename SumOf<T>::Type;
    constexpr int LINES = LEFT_LINES + COLUMNS, QUADS = LINES * LINE_BYTES / 16;
    unsigned char* const left = aligned_shared();
    unsigned char* const right = left + LEFT_LINES * LINE_BYTES;
    unsigned char* const ring = left + LINES * LINE_BYTES;
    uint64_t* const filled = reinterpret_cast<uint64_t*>(ring + RING * p.copy_lines * LINE_BYTES);
    int* const multiplying = reinterpret_cast<int*>(filled + RING);
    for (int i = int(threadIdx.x); i < QUADS; i += THREADS)
        reinterpret_cast<uint4*>(left)[i] = load_global(static_cast<const uint4*>(p.operands) + i);
    if (threadIdx.x == 0) {
        for (int i = 0; i < RING; ++i) barrier_init(filled + i, 1);
        barrier_init_done();
        *multiplying = MULTIPLYING / WARPGROUP;
    }
    stores_done();
    __syncthreads();
    const int group = int(threadIdx.x) / WARPGROUP;
    if (group == MULTIPLYING / WARPGROUP) {
        if (threadIdx.x != MULTIPLYING || !p.copy_lines) return;
        const int came = copy_meanwhile(map, p, ring, filled, multiplying);
        store_global(p.boxes + blockIdx.x, came);
        if (came < 0) store_global(p.failed, 1);
        return;
    }
    const uint64_t a = descriptor_of(shared_address(left + group * 64 * LINE_BYTES), 8 * LINE_BYTES, 0);
    const uint64_t b = descriptor_of(shared_address(right), 8 * LINE_BYTES, 0);
    Sum sums[COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) sums[i] = 0;
    const long long begin = clocks_now();
    for (int step = 0; step < p.steps; ++step) {
        wgmma_begin();
#pragma unroll
        for (int part = 0; part < PARTS; ++part) multiply_add_wide<T>(sums, a + part * 2, b + part * 2, true);
        wgmma_commit();
        wgmma_wait<1>(sums);
    }
    wgmma_wait<0>(sums);
    const long long clocks = clocks_now() - begin;
    float total = 0;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) total += float(sums[i]);
    store_global(p.sums + int64_t(blockIdx.x) * MULTIPLYING + threadIdx.x, total);
    sync_threads(1 + group, WARPGROUP);
    if (threadIdx.x % WARPGROUP == 0) {
        if (group == 0) store_global(p.clocks + blockIdx.x, clocks);
        *const_cast<volatile int*>(multiplying) = 0;
    }
#endif
}

template <typename T, int COLUMNS>
cudaError_t launch(const TensorMap& map, const Products& p, cudaStream_t stream) {
    const int bytes = 1024 + (LEFT_LINES + COLUMNS + RING * p.copy_lines) * LINE_BYTES + RING * 8 + 16;
    return launch_kernel(multiply_kernel<T, COLUMNS>, p.blocks, THREADS, bytes, 1, stream, map, p);
}

template <typename T>
cudaError_t launch_of(const TensorMap& map, const Products& p, cudaStream_t stream) {
    switch (p.columns) {
        case 128: return launch<T, 128>(map, p, stream);
#ifdef __CUDACC__
        case 160: return launch<T, 160>(map, p, stream);
        case 256: return launch<T, 256>(map, p, stream);
#endif
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t multiply(const Products& p, Operand operand, cudaStream_t stream) {
    if (p.blocks < 1 || p.steps < 1 || p.copy_lines < 0 || p.copy_lines > 256 ||
        (p.copy_lines && p.region % p.copy_lines))
        return cudaErrorInvalidValue;
    TensorMap map{};
    if (p.copy_lines) {
        const cuuint64_t sizes[] = {64, cuuint64_t(p.region)}, strides[] = {LINE_BYTES};
        const cuuint32_t box[] = {64, cuuint32_t(p.copy_lines)}, steps[] = {1, 1};
        if (!encode_tensor_map(map, 2, 2, p.source, sizes, strides, box, steps)) return cudaErrorInvalidValue;
    }
    switch (operand) {
        case Operand::int8: return launch_of<int8_t>(map, p, stream);
        case Operand::float8_e4m3fn: return launch_of<Float8>(map, p, stream);
        case Operand::bfloat16: return launch_of<Bfloat16>(map, p, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace vpd::probes
