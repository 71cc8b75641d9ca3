// Whether matrix instructions read swizzled lines that begin anywhere, with groups of 8 lines any distance apart.
#include "cuda/probes/bounded.cuh"
#include "cuda/probes/probes.h"

namespace vpd::probes {
namespace {

constexpr int THREADS = 128, COLUMNS = 64, MAX_LINES = 512;

// A line of 128 bytes as TMA writes it with a swizzle of 128 bytes: 16-byte pieces change places by the line's address.
__device__ inline void store_swizzled(unsigned char* tile, int line, int piece, uint4 value) {
    const uint32_t row = (shared_address(tile) >> 7) + uint32_t(line);
    reinterpret_cast<uint4*>(tile)[line * 8 + (piece ^ int(row & 7))] = value;
}

__global__ void __launch_bounds__(THREADS) tile_kernel(const __grid_constant__ Tiles p) {
#if VPD_HOPPER
    unsigned char* const left = aligned_shared();
    unsigned char* const right = left + MAX_LINES * LINE_BYTES;
    for (int i = int(threadIdx.x); i < p.lines * 8; i += THREADS)
        store_swizzled(left, i / 8, i % 8, load_global(reinterpret_cast<const uint4*>(p.left) + i));
    for (int i = int(threadIdx.x); i < COLUMNS * 8; i += THREADS)
        store_swizzled(right, i / 8, i % 8, load_global(reinterpret_cast<const uint4*>(p.right) + i));
    stores_done();
    __syncthreads();
    const int start = load_global(p.starts + blockIdx.x), apart = load_global(p.aparts + blockIdx.x);
    const unsigned offset = unsigned(load_global(p.offsets + blockIdx.x));
    const uint64_t a = descriptor_of(shared_address(left + start * LINE_BYTES), uint32_t(apart) * LINE_BYTES, offset);
    const uint64_t b = descriptor_of(shared_address(right), 8 * LINE_BYTES, 0);
    int32_t sums[COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) sums[i] = 0;
    wgmma_begin();
#pragma unroll
    for (int part = 0; part < 4; ++part) multiply_add_wide<int8_t>(sums, a + part * 2, b + part * 2, true);
    wgmma_commit();
    wgmma_wait<0>(sums);
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    int32_t* const out = p.sums + (int64_t(blockIdx.x) * 64 + warp * 16 + lane / 4) * COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) store_global(out + i / 2 % 2 * 8 * COLUMNS + i / 4 * 8 + i % 2, sums[i]);
#endif
}

}  // namespace

cudaError_t multiply_tiles(const Tiles& p, cudaStream_t stream) {
    if (p.cases < 1 || p.lines < 64 || p.lines > MAX_LINES) return cudaErrorInvalidValue;
    const int bytes = 1024 + (MAX_LINES + COLUMNS) * LINE_BYTES;
    return launch_kernel(tile_kernel, p.cases, THREADS, bytes, 1, stream, p);
}

}  // namespace vpd::probes
