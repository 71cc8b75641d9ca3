// Gradients of cross_attention_maps for q, k and v. The probabilities are computed again, tile by tile.
//
// Heads do not depend on each other here. An image's queries are shared out in chunks, whose number does not depend on
// the threads; each adds up its own gradients of K and V, and these are summed in order.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vpd {

struct CrossAttentionMapsBackwardPlan {
    const float *q, *k, *v;  // (batch, queries, heads * dim), (batch or 1, tokens, heads * dim); the last stride is 1
    const float* grad_out;   // (batch, queries, heads * dim), the last stride is 1; null: zero
    const float* grad_maps;  // (batch, heads or 1, queries, n_maps) of any strides; null: zero
    float *dq, *dk, *dv;     // contiguous; dk and dv have the batch of k and v
    int64_t batch, queries, tokens, heads, dim, n_maps;
    // Strides of images and rows in elements; an image stride of 0: shared.
    int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2];
    int64_t maps_stride[4];
    const int32_t* category_ids;    // (tokens), -1: none; null: one map for each token
    const float* category_weights;  // (n_maps)
    float scale, weight;            // weight: of each head's probabilities in the maps

    int64_t contexts;       // batch of k and v, and so of dk and dv: 1 or batch
    int64_t tiles, chunks;  // tiles of 32 queries in an image; chunks of a context's tiles
    int64_t padded_dim;     // up to a multiple of 16
};

constexpr int64_t BACKWARD_TILE_QUERIES = 32;

}  // namespace vpd

// Work items of the first are (context, head, chunk), numbered (context * heads + head) * chunks + chunk; it fills dq and
// partial[item] = gradients of K and of V, [2][tokens][padded_dim]. Items of the second are (context, head); it fills dk
// and dv. They do [first, last). scratch belongs to one thread; it and partial are aligned to 64 bytes.
VPD_DECLARE_PER_ISA(void cross_attention_maps_backward_chunks(const ::vpd::CrossAttentionMapsBackwardPlan& plan,
                                                              float* partial, int64_t first, int64_t last,
                                                              float* scratch);
                    void cross_attention_maps_backward_sum(const ::vpd::CrossAttentionMapsBackwardPlan& plan,
                                                           const float* partial, int64_t first, int64_t last))
