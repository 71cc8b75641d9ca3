// The attention operators, out = softmax(scale * q k^T) v per head: see vpd_fast/ops/self_attention.py,
// cross_attention_maps.py and cross_attention_maps_backward.py. Memory is aligned to 64 bytes; scratch belongs to one
// thread; functions do the work items [first, last).
#pragma once

#include <cstdint>

#include "isa.h"

namespace vpd {

struct AttentionPlan {
    const void *q, *k, *v;  // (batch, queries, heads * dim), (contexts, tokens, heads * dim); the last stride is 1
    bool bf16;              // element type of these, and of out: bfloat16, otherwise float32
    int64_t batch, contexts, queries, tokens, heads, dim;  // contexts: different K and V, batch or 1
    int64_t q_stride[2], k_stride[2], v_stride[2];         // image, row; in elements
    float scale;
};

// Without the probabilities in memory. Keys are read in pieces. The probabilities of a piece are relative to a reference
// that is near the largest score so far; what has been added up is rescaled only when a score exceeds the reference by
// much (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
struct SelfAttentionPlan : AttentionPlan {
    void* out;  // (batch, queries, heads * dim); the last stride is 1
    int64_t out_stride[2];
};

// How a level divides the work.
struct SelfAttentionSizes {
    int64_t packed;   // floats of packed memory for one head of a context, a multiple of 16
    int64_t scratch;  // floats of scratch memory for one thread
    int64_t queries;  // that are worked on together: a part
};

struct MapsPlan : AttentionPlan {
    const int32_t* category_ids;    // (tokens), -1: none; null: one map for each token
    const float* category_weights;  // (n_maps)
    int64_t n_maps;
    float weight;
};

// maps = addend + weight * (head-mean of the probabilities, in categories). Each tile of queries goes through all heads,
// so that the maps are added up in the cache and written once.
struct CrossAttentionMapsPlan : MapsPlan {
    void* out;            // (batch, queries, heads * dim), contiguous
    float* maps;          // (batch, heads or 1, queries, n_maps) of any strides, or null
    const float* addend;  // likewise, or null; may be the same memory as maps
    int64_t maps_stride[4], addend_stride[4];
    bool average_heads;
    int64_t tile, tiles;  // queries that are worked on together, a multiple of 16; tiles of an image
    int64_t packed_size;  // floats of packed memory for one head of a context: K and V; 0: not packed
};

constexpr int64_t MAX_TILE_QUERIES = 64;

// Gradients of q, k and v. The probabilities are computed again, tile by tile. Heads do not depend on each other here. An
// image's queries are shared out in chunks, whose number does not depend on the threads; each adds up its own gradients of
// K and V, and these are summed in order. All float32; weight is that of each head's probabilities in the maps.
struct CrossAttentionMapsBackwardPlan : MapsPlan {
    const float* grad_out;   // (batch, queries, heads * dim), the last stride is 1; null: zero
    const float* grad_maps;  // (batch, heads or 1, queries, n_maps) of any strides; null: zero
    float *dq, *dk, *dv;     // contiguous; dk and dv have the batch of k and v
    int64_t out_stride[2], maps_stride[4];
    int64_t tiles, chunks;  // tiles of 32 queries in an image; chunks of a context's tiles
    int64_t padded_dim;     // up to a multiple of 16
};

constexpr int64_t BACKWARD_TILE_QUERIES = 32;

}  // namespace vpd

// Items of `pack` are (context, head), numbered context * heads + head; of `parts` (image, head, part), numbered
// (image * heads + head) * parts + part.
VPD_DECLARE_PER_ISA(::vpd::SelfAttentionSizes self_attention_sizes(const ::vpd::SelfAttentionPlan& plan);
                    void self_attention_pack(const ::vpd::SelfAttentionPlan& plan, float* packed, int64_t first,
                                             int64_t last);
                    void self_attention_parts(const ::vpd::SelfAttentionPlan& plan, const float* packed, int64_t first,
                                              int64_t last, float* scratch))

// Items of `pack`, which prepares K and V of 16 bits and is not needed for float32, are (context, head); of `tiles`
// (image, tile), numbered image * tiles + tile.
VPD_DECLARE_PER_ISA(void cross_attention_maps_pack(const ::vpd::CrossAttentionMapsPlan& plan, float* packed,
                                                   int64_t first, int64_t last);
                    void cross_attention_maps_tiles(const ::vpd::CrossAttentionMapsPlan& plan, const float* packed,
                                                    int64_t first, int64_t last, float* scratch))

// Items of `chunks` are (context, head, chunk), numbered (context * heads + head) * chunks + chunk; it fills dq and
// partial[item] = gradients of K and of V, [2][tokens][padded_dim]. Items of `sum` are (context, head); it fills dk, dv.
VPD_DECLARE_PER_ISA(void cross_attention_maps_backward_chunks(const ::vpd::CrossAttentionMapsBackwardPlan& plan,
                                                              float* partial, int64_t first, int64_t last,
                                                              float* scratch);
                    void cross_attention_maps_backward_sum(const ::vpd::CrossAttentionMapsBackwardPlan& plan,
                                                           const float* partial, int64_t first, int64_t last))
