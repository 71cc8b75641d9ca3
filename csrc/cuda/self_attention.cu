// Chooses a kernel for self_attention and describes the tensor maps that it reads through; the kernel is in
// self_attention.cuh.
#include "cuda/self_attention.cuh"

#include <algorithm>
#include <iterator>

#include "cuda/device.h"
#include "sizes.h"

namespace vpd {
namespace {

using namespace attention;

constexpr int64_t MAX_COUNT = int64_t(1) << 30;  // of what is counted with 32 bits, with room for a tile more
constexpr int POLYNOMIAL_DIM = 40;               // up to which exponentials, not products, take the time

// Warpgroups per block: as many as leave no multiprocessor idle, because blocks share what they read of keys and values.
int choose_groups(const CudaSelfAttention& p, int max_groups) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    int groups = max_groups;
    while (groups > 1 && p.batch * p.heads * ceil_divide(p.queries, groups * GROUP_ROWS) < processors) --groups;
    return groups;
}

template <typename T, int DIM, int GROUPS, bool OVERLAP, int POLYNOMIAL>
cudaError_t launch(const CudaSelfAttention& p, cudaStream_t stream) {
    using Size = Tile<DIM, GROUPS>;
    Plan plan{};
    plan.tiles = int(ceil_divide(p.queries, Size::ROWS)), plan.blocks = int(ceil_divide(p.keys, Size::KEYS));
    plan.shared = !p.k.image && !p.v.image;
    // A scale of 0 must not make NaN of scores of infinity that stand for nothing.
    plan.scale_log2 = std::max(float(p.scale * LOG2_E), 1.17549435e-38f);
    const int64_t blocks = plan.tiles * p.heads * p.batch, key_images = plan.shared ? 1 : p.batch;
    Maps maps{};
    const auto encode = [&](TensorMap& map, const CudaRows& x, int64_t images, int64_t rows, int box_rows) {
        return encode_rows(map, p.heads, p.head_dim, x, images, rows, box_rows);
    };
    if (!encode(maps.q, p.q, p.batch, p.queries, Size::ROWS) || !encode(maps.k, p.k, key_images, p.keys, Size::KEYS) ||
        !encode(maps.v, p.v, key_images, p.keys, Size::KEYS))
        return cudaErrorInvalidValue;
    return launch_kernel(attention_kernel<T, DIM, GROUPS, OVERLAP, POLYNOMIAL>, blocks, Size::THREADS,
                         Size::SHARED_BYTES, 1, stream, maps, p, plan);
}

template <typename T, int DIM, int GROUPS>
cudaError_t launch_in_order(const CudaSelfAttention& p, CudaAttentionOrder order, cudaStream_t stream) {
    if constexpr (DIM == POLYNOMIAL_DIM)
        if (order == CudaAttentionOrder::polynomial) return launch<T, DIM, GROUPS, true, 8>(p, stream);
    return order == CudaAttentionOrder::sequential ? launch<T, DIM, GROUPS, false, 0>(p, stream)
                                                   : launch<T, DIM, GROUPS, true, 0>(p, stream);
}

template <typename T, int DIM, int MAX>
cudaError_t launch_groups(const CudaSelfAttention& p, CudaAttentionOrder order, int groups, cudaStream_t stream) {
    if (!groups) groups = choose_groups(p, MAX);
    if (groups == 1) return launch_in_order<T, DIM, 1>(p, order, stream);
    if (groups == 2) return launch_in_order<T, DIM, 2>(p, order, stream);
    if constexpr (MAX == 3)
        if (groups == 3) return launch_in_order<T, DIM, 3>(p, order, stream);
    return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_dim(const CudaSelfAttention& p, CudaAttentionOrder order, int groups, cudaStream_t stream) {
    if (p.head_dim <= 40) return launch_groups<T, 40, 3>(p, order, groups, stream);
    if (p.head_dim <= 80) return launch_groups<T, 80, 2>(p, order, groups, stream);
    return launch_groups<T, 160, 2>(p, order, groups, stream);
}

}  // namespace

const char* self_attention_cuda_refuses(const CudaSelfAttention& p, CudaFloat dtype, CudaAttentionOrder order) {
    if (dtype == CudaFloat::float32) return "q, k and v must be bfloat16 or float16";
    if (p.batch < 0 || p.queries < 0 || p.heads < 1 || p.keys < 1 || p.head_dim < 1) return "a size is too small";
    if (p.head_dim % 8) return "the head dimension is not a multiple of 8";
    if (p.head_dim > *std::prev(std::end(HEAD_DIMS))) return "there are more than 160 elements per head";
    if (order == CudaAttentionOrder::polynomial && p.head_dim > POLYNOMIAL_DIM)
        return "exponentials by a polynomial are for up to 40 elements per head";
    if (!(p.scale >= 0)) return "the scale is negative";
    if (p.queries >= MAX_COUNT || p.keys >= MAX_COUNT || p.batch * p.heads >= MAX_COUNT ||
        p.batch * p.heads * ceil_divide(p.queries, GROUP_ROWS) >= MAX_COUNT)
        return "there are too many queries or keys";
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9)
        return "the device has no wgmma that this was compiled for";
    if (const char* reason = rows_refuse(p.q, p.batch, p.queries)) return reason;
    if (p.batch > 1 && (!p.q.image || !p.k.image != !p.v.image)) return "images share queries, or keys or values alone";
    if (const char* reason = rows_refuse(p.k, p.batch, p.keys)) return reason;
    if (const char* reason = rows_refuse(p.v, p.batch, p.keys)) return reason;
    if (!p.round_factors != !p.round_shifts) return "factors and shifts of a result belong together";
    if (reinterpret_cast<uintptr_t>(p.out.data) % (p.round_factors ? 2 : 4) || p.out.image % 2 || p.out.row % 2)
        return "two neighbouring numbers of out are not aligned";
    return nullptr;
}

cudaError_t self_attention_cuda(const CudaSelfAttention& p, CudaFloat dtype, CudaAttentionOrder order, int groups,
                                cudaStream_t stream) {
    if (self_attention_cuda_refuses(p, dtype, order)) return cudaErrorInvalidValue;
    if (p.batch == 0 || p.queries == 0) return cudaSuccess;
    return dtype == CudaFloat::bfloat16 ? launch_dim<Bfloat16>(p, order, groups, stream)
                                        : launch_dim<Float16>(p, order, groups, stream);
}

}  // namespace vpd
