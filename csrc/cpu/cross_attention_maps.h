// out = softmax(scale * q k^T) v per head; maps = addend + weight * (head-mean of the probabilities, in categories)
//
// Each tile of queries goes through all heads, so that the maps are added up in the cache and written once.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vpd {

constexpr int64_t MAX_TILE_QUERIES = 64;

struct CrossAttentionMapsPlan {
    const void *q, *k, *v;  // (batch, queries, heads * dim), (batch or 1, tokens, heads * dim); the last stride is 1
    void* out;              // (batch, queries, heads * dim), contiguous
    bool bf16;              // element type of these four: bfloat16, otherwise float32
    int64_t batch, queries, tokens, heads, dim;
    int64_t q_stride[2], k_stride[2], v_stride[2];  // image, row; in elements; an image stride of 0: shared
    float* maps;                                    // (batch, heads or 1, queries, n_maps) of any strides, or null
    const float* addend;                            // likewise, or null; may be the same memory as maps
    int64_t maps_stride[4], addend_stride[4];
    int64_t n_maps;
    const int32_t* category_ids;    // (tokens), -1: none; null: one map for each token
    const float* category_weights;  // (n_maps)
    bool average_heads;
    float scale, weight;
    int64_t tile, tiles;  // queries that are worked on together, a multiple of 16; tiles of an image

    int64_t contexts;     // different K and V: 1 if all images share them, otherwise batch
    int64_t packed_size;  // floats of packed memory for one head of a context: K and V; 0: not packed
};

}  // namespace vpd

// Work items of the first are (context, head), numbered context * heads + head; of the second (image, tile), numbered
// image * tiles + tile. They do [first, last). The first prepares K and V of 16 bits, and is not needed for float32.
// packed and scratch are aligned to 64 bytes; scratch belongs to one thread.
VPD_DECLARE_PER_ISA(void cross_attention_maps_pack(const ::vpd::CrossAttentionMapsPlan& plan, float* packed,
                                                   int64_t first, int64_t last);
                    void cross_attention_maps_tiles(const ::vpd::CrossAttentionMapsPlan& plan, const float* packed,
                                                    int64_t first, int64_t last, float* scratch))
