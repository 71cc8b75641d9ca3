// Attention over a few tokens that also returns the probabilities, averaged over heads and summed into categories:
//
//     S = scale q_h k_h^T,  P_h = softmax(S),  out_h = P_h v_h,  maps = addend + weight * (mean_h P_h or each P_h) G
//
// with G (tokens, categories) the weighted assignment of tokens to categories, or the identity. Products of 16-bit elements
// on tensor cores, everything else in float32; P is rounded to 16 bits for P v only. Bitwise repeatable.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.h"

namespace vpd {

struct CudaMapStrides {
    int64_t image, head, row, column;  // in elements; head is used without averaging only
};

struct CudaCrossAttentionMaps {
    int64_t batch, queries, tokens, heads, head_dim;
    // (batch, queries, heads * head_dim) and twice (batch, tokens, heads * head_dim), all of one 16-bit type; the last
    // dimension is contiguous. A stride of 0 between images shares tokens. Addresses are multiples of 16 bytes and strides,
    // in elements, multiples of 8.
    const void *q, *k, *v;
    int64_t q_image, q_row, k_image, k_row, v_image, v_row;
    void* out;   // like q, contiguous
    void* maps;  // (batch, queries, columns), or (batch, heads, queries, columns) without averaging; null: not wanted
    CudaFloat maps_dtype;
    CudaMapStrides maps_strides;
    const float* addend;  // like maps, or null; may be the same memory
    CudaMapStrides addend_strides;
    float scale, weight;
    bool average_heads;
    // Category c is category_weights[c] times the sum over tokens category_tokens[category_offsets[c]] up to, not
    // including, [category_offsets[c + 1]]. Null offsets: each token is a column (null tokens: none has a category).
    const int32_t *category_tokens, *category_offsets;
    const float* category_weights;
    int64_t categories;
    void* scratch;  // of cross_attention_maps_cuda_scratch() bytes; null if that is 0
};

// How the mean over heads is formed. Other requests for maps need no choice: each head then has its own blocks.
enum class CudaSchedule {
    automatic,   // heads_loop if there are enough tiles of queries to fill the device, else cluster, else split
    heads_loop,  // a block loops over all heads of its tile
    cluster,     // a cluster of blocks shares the heads of a tile and adds up in distributed shared memory; sm_90 only
    split,       // blocks share the heads of a tile and write partial sums to scratch, which a second kernel adds up
};

// nullptr if the operator can run on the current device, else the reason why it cannot; scratch does not matter.
const char* cross_attention_maps_cuda_refuses(const CudaCrossAttentionMaps& problem, CudaFloat dtype,
                                              CudaSchedule schedule);

// Bytes of scratch that a problem needs on the current device. Only sizes, average_heads and whether maps is null matter.
int64_t cross_attention_maps_cuda_scratch(const CudaCrossAttentionMaps& problem, CudaFloat dtype,
                                          CudaSchedule schedule);

// Enqueues on the stream of the current device; returns the launch's error, or cudaErrorInvalidValue if the operator
// refuses or lacks scratch.
cudaError_t cross_attention_maps_cuda(const CudaCrossAttentionMaps& problem, CudaFloat dtype, CudaSchedule schedule,
                                      cudaStream_t stream);

}  // namespace vpd
