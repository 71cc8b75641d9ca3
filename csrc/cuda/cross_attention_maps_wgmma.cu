// Chooses a kernel and a schedule for cross_attention_maps with wgmma; the kernel is in cross_attention_maps_wgmma.cuh.
#include "cuda/cross_attention_maps_wgmma.cuh"

#include <algorithm>
#include <iterator>

#include "sizes.h"

namespace vpd {
namespace {

using namespace attention_maps;

constexpr int64_t MAX_COUNT = int64_t(1) << 30;  // of what is counted with 32 bits, with room for a tile more

CudaRows queries_of(const CudaCrossAttentionMaps& p) { return {const_cast<void*>(p.q), p.q_image, p.q_row}; }
CudaRows keys_of(const CudaCrossAttentionMaps& p) { return {const_cast<void*>(p.k), p.k_image, p.k_row}; }
CudaRows values_of(const CudaCrossAttentionMaps& p) { return {const_cast<void*>(p.v), p.v_image, p.v_row}; }
CudaRows result_of(const CudaCrossAttentionMaps& p) {
    const int64_t width = p.heads * p.head_dim;
    return {p.out, p.queries * width, width};
}

// As many blocks per tile as a cluster may have, and heads for them: a power of two.
int max_groups(const CudaCrossAttentionMaps& p) {
    int groups = 1;
    while (groups < MAX_CLUSTER && groups * 2 <= p.heads) groups *= 2;
    return groups;
}

// Sets how the blocks of a tile share its heads: as many as run at once.
void choose_schedule(const CudaCrossAttentionMaps& p, CudaSchedule schedule, int resident, WgmmaPlan& plan) {
    if (heads_are_apart(p)) {
        plan.groups = int(p.heads), plan.head_sum = HeadSum::write;
        return;
    }
    const int64_t at_once = int64_t(resident) * device_attribute(cudaDevAttrMultiProcessorCount);
    plan.groups = 1;
    while (plan.groups < max_groups(p) && tiles_of(p, plan) * plan.groups * 2 <= at_once) plan.groups *= 2;
    if (schedule == CudaSchedule::heads_loop) plan.groups = 1;
    if (schedule == CudaSchedule::cluster) plan.groups = std::max(plan.groups, 2);
    plan.head_sum = plan.groups == 1 ? HeadSum::write : HeadSum::cluster;
}

template <typename T, int TOKENS, int DIM, int WARPGROUPS>
cudaError_t launch(const CudaCrossAttentionMaps& p, CudaSchedule schedule, cudaStream_t stream) {
    using Size = WgmmaTile<TOKENS, DIM, WARPGROUPS>;
    WgmmaPlan plan{};
    plan.tiles_per_image = ceil_divide(p.queries, Size::ROWS);
    plan_columns(p, plan);
    choose_schedule(p, schedule, Size::RESIDENT, plan);
    plan.shared = !p.k_image && !p.v_image;
    // A scale of 0 must not make NaN of scores of infinity that stand for nothing.
    plan.scale_log2 = std::max(float(p.scale * LOG2_E), 1.17549435e-38f);
    WgmmaMaps maps{};
    const auto encode = [&](TensorMap& map, const CudaRows& x, int64_t images, int64_t rows, int box_rows) {
        return attention::encode_rows(map, p.heads, p.head_dim, x, images, rows, box_rows);
    };
    const int64_t token_images = plan.shared ? 1 : p.batch;
    if (!encode(maps.q, queries_of(p), p.batch, p.queries, Size::ROWS) ||
        !encode(maps.k, keys_of(p), token_images, p.tokens, TOKENS) ||
        !encode(maps.v, values_of(p), token_images, p.tokens, TOKENS) ||
        !encode(maps.out, result_of(p), p.batch, p.queries, ROWS_PER_STORE))
        return cudaErrorInvalidValue;
    return launch_kernel(one_block_kernel<T, TOKENS, DIM, WARPGROUPS>, tiles_of(p, plan) * plan.groups, Size::THREADS,
                         Size::SHARED_BYTES, plan.head_sum == HeadSum::cluster ? plan.groups : 1, stream, maps, p,
                         plan);
}

// Warpgroups of a block: one where several blocks run side by side, or all blocks at once; else two, which share keys
// and values.
template <int TOKENS, int DIM>
int choose_warpgroups(const CudaCrossAttentionMaps& p) {
    if constexpr (min_warpgroups(TOKENS, DIM) > 1) {
        return 2;
    } else {
        const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
        const int64_t blocks = p.batch * ceil_divide(p.queries, GROUP_ROWS) * max_groups(p);
        return WgmmaTile<TOKENS, DIM, 1>::RESIDENT > 1 || p.queries <= GROUP_ROWS || blocks <= processors ? 1 : 2;
    }
}

template <typename T, int TOKENS, int DIM>
cudaError_t launch_groups(const CudaCrossAttentionMaps& p, CudaSchedule schedule, int warpgroups, cudaStream_t stream) {
    if (!warpgroups) warpgroups = choose_warpgroups<TOKENS, DIM>(p);
    if (warpgroups == 2) return launch<T, TOKENS, DIM, 2>(p, schedule, stream);
    if constexpr (min_warpgroups(TOKENS, DIM) == 1)
        if (warpgroups == 1) return launch<T, TOKENS, DIM, 1>(p, schedule, stream);
    return cudaErrorInvalidValue;
}

template <typename T, int TOKENS>
cudaError_t launch_dim(const CudaCrossAttentionMaps& p, CudaSchedule schedule, int warpgroups, cudaStream_t stream) {
    if (p.head_dim <= WGMMA_DIMS[0]) return launch_groups<T, TOKENS, WGMMA_DIMS[0]>(p, schedule, warpgroups, stream);
    if (p.head_dim <= WGMMA_DIMS[1]) return launch_groups<T, TOKENS, WGMMA_DIMS[1]>(p, schedule, warpgroups, stream);
    return launch_groups<T, TOKENS, WGMMA_DIMS[2]>(p, schedule, warpgroups, stream);
}

template <typename T>
cudaError_t launch_tokens(const CudaCrossAttentionMaps& p, CudaSchedule schedule, int warpgroups, cudaStream_t stream) {
    return p.tokens <= WGMMA_TOKENS[0] ? launch_dim<T, WGMMA_TOKENS[0]>(p, schedule, warpgroups, stream)
                                       : launch_dim<T, WGMMA_TOKENS[1]>(p, schedule, warpgroups, stream);
}

}  // namespace

const char* cross_attention_maps_wgmma_refuses(const CudaCrossAttentionMaps& p, CudaFloat dtype,
                                               CudaSchedule schedule) {
    if (dtype == CudaFloat::float32) return "q, k and v must be bfloat16 or float16";
    if (p.batch < 0 || p.queries < 0 || p.heads < 1 || p.tokens < 1 || p.head_dim < 1) return "a size is too small";
    if (p.head_dim % 8) return "the head dimension is not a multiple of 8";
    if (p.head_dim > *std::prev(std::end(WGMMA_DIMS))) return "there are more than 160 elements per head";
    if (p.tokens > *std::prev(std::end(WGMMA_TOKENS))) return "there are more than 160 tokens";
    if (!p.maps && p.batch && p.queries) return "no maps are wanted";
    if (!(p.scale >= 0)) return "the scale is negative";
    if (schedule == CudaSchedule::split) return "heads are shared by clusters, not by way of scratch memory";
    if (p.queries >= MAX_COUNT || p.batch * p.heads * ceil_divide(p.queries, GROUP_ROWS) >= MAX_COUNT)
        return "there are too many queries";
    if (!has_clusters()) return "the device has no wgmma that this was compiled for";
    if (const char* reason = attention::rows_refuse(queries_of(p), p.batch, p.queries)) return reason;
    if (p.batch > 1 && (!p.q_image || !p.k_image != !p.v_image)) return "images share queries, or keys or values alone";
    if (const char* reason = attention::rows_refuse(keys_of(p), p.batch, p.tokens)) return reason;
    if (const char* reason = attention::rows_refuse(values_of(p), p.batch, p.tokens)) return reason;
    return attention::rows_refuse(result_of(p), p.batch, p.queries);
}

cudaError_t cross_attention_maps_wgmma(const CudaCrossAttentionMaps& p, CudaFloat dtype, CudaSchedule schedule,
                                       int warpgroups, cudaStream_t stream) {
    if (cross_attention_maps_wgmma_refuses(p, dtype, schedule)) return cudaErrorInvalidValue;
    if (p.batch == 0 || p.queries == 0) return cudaSuccess;
    return dtype == CudaFloat::bfloat16 ? launch_tokens<Bfloat16>(p, schedule, warpgroups, stream)
                                        : launch_tokens<Float16>(p, schedule, warpgroups, stream);
}

}  // namespace vpd
