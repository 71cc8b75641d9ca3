// How fast TMA brings boxes from the L2 cache to shared memory.
#include "cuda/probes/bounded.cuh"
#include "cuda/probes/probes.h"
#include "cuda/tensor_map.h"

namespace vpd::probes {
namespace {

constexpr int THREADS = 32, MAX_STAGES = 8;

template <int CLUSTER>
__global__ void __launch_bounds__(THREADS)
    copy_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ Copies p) {
#if VPD_HOPPER
    unsigned char* const stages = aligned_shared();
    const int box_bytes = p.lines * LINE_BYTES;
    uint64_t* const filled = reinterpret_cast<uint64_t*>(stages + p.stages * box_bytes);
    uint64_t* const emptied = filled + p.stages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; ++i) barrier_init(filled + i, 1), barrier_init(emptied + i, CLUSTER);
        barrier_init_done();
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) cluster_arrive(), cluster_wait();
    if (threadIdx.x == 0) {
        const int part = p.lines / CLUSTER, rank = int(rank_in_cluster());
        const long long begin = clocks_now();
        bool good = true;
        int64_t line = int64_t(blockIdx.x / CLUSTER) * p.boxes * p.lines % p.region;
        for (int i = 0; i < p.boxes + p.stages && good; ++i) {
            const int stage = i % p.stages;
            const unsigned parity = unsigned(i / p.stages - 1) & 1;
            if (i >= p.stages) {
                good = barrier_wait_bounded(filled + stage, parity);
                if constexpr (CLUSTER > 1) {  // nobody's box may be overwritten before it has come
                    for (int other = 0; other < CLUSTER; ++other) barrier_arrive_at(emptied + stage, unsigned(other));
                    if (i < p.boxes) good = barrier_wait_bounded(emptied + stage, parity) && good;
                }
            }
            if (i >= p.boxes) continue;
            barrier_expect(filled + stage, unsigned(box_bytes));
            unsigned char* const box = stages + stage * box_bytes + rank * part * LINE_BYTES;
            if constexpr (CLUSTER > 1)
                load_box_to_all(box, map, filled + stage, 0, int(line) + rank * part, uint16_t((1 << CLUSTER) - 1));
            else
                load_box(box, map, filled + stage, 0, int(line));
            line += p.lines;
            if (line >= p.region) line -= p.region;
        }
        store_global(p.clocks + blockIdx.x, clocks_now() - begin);
        if (!good) store_global(p.failed, 1);
    }
    if constexpr (CLUSTER > 1) cluster_arrive(), cluster_wait();  // others may still send here
#endif
}

}  // namespace

cudaError_t copy_boxes(const Copies& p, cudaStream_t stream) {
    if (p.lines < 1 || p.lines > 256 || p.lines % p.cluster || p.region % p.lines || p.stages < 1 ||
        p.stages > MAX_STAGES || p.blocks < 1 || p.blocks % p.cluster || p.boxes < 1)
        return cudaErrorInvalidValue;
    TensorMap map{};
    const cuuint64_t sizes[] = {64, cuuint64_t(p.region)}, strides[] = {LINE_BYTES};
    const cuuint32_t box[] = {64, cuuint32_t(p.lines / p.cluster)}, steps[] = {1, 1};
    if (!encode_tensor_map(map, 2, 2, p.source, sizes, strides, box, steps)) return cudaErrorInvalidValue;
    const int bytes = 1024 + p.stages * (p.lines * LINE_BYTES + 16);
    switch (p.cluster) {
        case 1: return launch_kernel(copy_kernel<1>, p.blocks, THREADS, bytes, 1, stream, map, p);
        case 2: return launch_kernel(copy_kernel<2>, p.blocks, THREADS, bytes, 2, stream, map, p);
        case 4: return launch_kernel(copy_kernel<4>, p.blocks, THREADS, bytes, 4, stream, map, p);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace vpd::probes
