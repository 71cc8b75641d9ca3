// Chooses a kernel and a schedule for cross_attention_maps; the kernels are in cross_attention_maps.cuh.
#include "cuda/cross_attention_maps.h"

#include <iterator>
#include <utility>

#include "cuda/cross_attention_maps.cuh"
#include "cuda/device.h"

namespace vpd {
namespace {

using namespace attention_maps;

constexpr double LOG2_E = 1.4426950408889634;

struct Kernel {
    void (*run)(CudaCrossAttentionMaps, Plan);
    int tokens, dim;
};

template <typename T, size_t... INDEX>
Kernel smallest_kernel(int64_t tokens, int64_t dim, std::index_sequence<INDEX...>) {
    constexpr size_t N = std::size(DIM_SIZES);
    static constexpr Kernel KERNELS[] = {{forward_kernel<T, TOKEN_SIZES[INDEX / N], DIM_SIZES[INDEX % N]>,
                                          TOKEN_SIZES[INDEX / N], DIM_SIZES[INDEX % N]}...};
    for (const Kernel& kernel : KERNELS)
        if (tokens <= kernel.tokens && dim <= kernel.dim) return kernel;
    return {};
}

Kernel find_kernel(const CudaCrossAttentionMaps& p, CudaFloat dtype) {
    constexpr auto INDICES = std::make_index_sequence<std::size(TOKEN_SIZES) * std::size(DIM_SIZES)>();
    if (dtype == CudaFloat::bfloat16) return smallest_kernel<Bfloat16>(p.tokens, p.head_dim, INDICES);
    return smallest_kernel<Float16>(p.tokens, p.head_dim, INDICES);
}

// As many blocks per tile as fill the device: a power of two.
int groups_to_fill(int64_t tiles, int64_t heads) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    int groups = 1;
    while (groups < MAX_CLUSTER && groups * 2 <= heads && tiles * groups < processors) groups *= 2;
    return groups;
}

// Sets groups and head_sum for maps that are means over several heads.
void choose_schedule(const CudaCrossAttentionMaps& p, CudaSchedule schedule, Plan& plan) {
    plan.groups = groups_to_fill(tiles_of(p, plan), p.heads);
    if (schedule == CudaSchedule::automatic) {
        // Adding up in a second kernel costs about as much as it saves when it halves the work of a block.
        if (plan.groups == 1 || (!has_clusters() && plan.groups == 2))
            schedule = CudaSchedule::heads_loop;
        else
            schedule = has_clusters() ? CudaSchedule::cluster : CudaSchedule::split;
    }
    if (schedule == CudaSchedule::heads_loop)
        plan.groups = 1;
    else if (plan.groups == 1)
        plan.groups = 2;
    plan.head_sum = schedule == CudaSchedule::heads_loop ? HeadSum::write
                    : schedule == CudaSchedule::cluster  ? HeadSum::cluster
                                                         : HeadSum::partial;
}

// False if the device has too little shared memory for the smallest tile.
bool choose_tile(const CudaCrossAttentionMaps& p, const Kernel& kernel, Plan& plan) {
    const int available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    for (plan.warps = MAX_WARPS; plan.warps > 0; plan.warps /= 2) {
        if (plan.warps > 1 && plan.warps * ROWS_PER_WARP / 2 >= p.queries) continue;
        for (bool one_buffer : {false, true}) {
            plan.one_buffer = one_buffer;
            if (SharedLayout(kernel.tokens, kernel.dim, plan.warps, one_buffer).total <= available) {
                const int64_t rows = plan.warps * ROWS_PER_WARP;
                plan.tiles_per_image = (p.queries + rows - 1) / rows;
                return true;
            }
        }
    }
    return false;
}

// Returns why there is no plan, or nullptr.
const char* make_plan(const CudaCrossAttentionMaps& p, CudaFloat dtype, CudaSchedule schedule, Kernel& kernel,
                      Plan& plan) {
    if (dtype == CudaFloat::float32) return "q, k and v must be bfloat16 or float16";
    if (p.batch < 0 || p.queries < 0 || p.heads < 1 || p.tokens < 1 || p.head_dim < 1) return "a size is too small";
    if (p.head_dim % 8) return "the head dimension is not a multiple of 8";
    kernel = find_kernel(p, dtype);
    if (!kernel.run) return "there are more than 256 tokens or more than 160 elements per head";
    if (schedule == CudaSchedule::cluster && !has_clusters())
        return "the device has no clusters that this was compiled for";
    if (!choose_tile(p, kernel, plan)) return "the device has too little shared memory";

    plan_columns(p, plan);
    plan.scale_log2 = float(p.scale * LOG2_E);
    if (!p.maps) {
        plan.groups = groups_to_fill(tiles_of(p, plan), p.heads), plan.head_sum = HeadSum::nothing;
    } else if (heads_are_apart(p)) {
        plan.groups = int(p.heads), plan.head_sum = HeadSum::write;
    } else {
        choose_schedule(p, schedule, plan);
    }
    // Blocks are numbered along x; the second kernel has up to as many per tile as a tile has rows.
    if (tiles_of(p, plan) > INT32_MAX / (plan.groups > 64 ? plan.groups : 64)) return "there are too many queries";
    return nullptr;
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

const char* cross_attention_maps_cuda_refuses(const CudaCrossAttentionMaps& p, CudaFloat dtype, CudaSchedule schedule) {
    Kernel kernel{};
    Plan plan{};
    if (const char* reason = make_plan(p, dtype, schedule, kernel, plan)) return reason;
    for (const void* address : {p.q, p.k, p.v, static_cast<const void*>(p.out)})
        if (!aligned(address)) return "an address is not a multiple of 16 bytes";
    for (int64_t stride : {p.q_image, p.q_row, p.k_image, p.k_row, p.v_image, p.v_row})
        if (stride % 8) return "a stride of q, k or v is not a multiple of 8 elements";
    for (int64_t stride : {p.q_row, p.k_row, p.v_row})
        if (stride < 0 || stride > UINT32_MAX) return "a row stride of q, k or v is negative or exceeds 32 bits";
    return nullptr;
}

int64_t cross_attention_maps_cuda_scratch(const CudaCrossAttentionMaps& p, CudaFloat dtype, CudaSchedule schedule) {
    Kernel kernel{};
    Plan plan{};
    if (make_plan(p, dtype, schedule, kernel, plan) || plan.head_sum != HeadSum::partial) return 0;
    return tiles_of(p, plan) * plan.groups * plan.warps * ROWS_PER_WARP * p.tokens * int64_t(sizeof(float));
}

cudaError_t cross_attention_maps_cuda(const CudaCrossAttentionMaps& p, CudaFloat dtype, CudaSchedule schedule,
                                      cudaStream_t stream) {
    if (cross_attention_maps_cuda_refuses(p, dtype, schedule)) return cudaErrorInvalidValue;
    Kernel kernel{};
    Plan plan{};
    make_plan(p, dtype, schedule, kernel, plan);
    if (p.batch == 0 || p.queries == 0) return cudaSuccess;
    if (plan.head_sum == HeadSum::partial && !p.scratch) return cudaErrorInvalidValue;
    const int shared_bytes = SharedLayout(kernel.tokens, kernel.dim, plan.warps, plan.one_buffer).total;
    const int cluster = plan.head_sum == HeadSum::cluster ? plan.groups : 1;
    const cudaError_t status = launch_kernel(kernel.run, tiles_of(p, plan) * plan.groups, plan.warps * WARP,
                                             shared_bytes, cluster, stream, p, plan);
    if (status != cudaSuccess || plan.head_sum != HeadSum::partial) return status;
    const int64_t parts = plan.warps * ROWS_PER_WARP / ROWS_PER_ADD;
    return launch_kernel(add_partial_kernel, tiles_of(p, plan) * parts, plan.warps * WARP,
                         int(ROWS_PER_ADD * p.tokens * sizeof(float)), 1, stream, p, plan);
}

}  // namespace vpd
