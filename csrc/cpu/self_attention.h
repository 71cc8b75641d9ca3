// out = softmax(scale * q k^T) v per head, without the probabilities in memory.
//
// Keys are read in pieces. The probabilities of a piece are relative to a reference that is near the largest score so
// far; what has been added up is rescaled only when a score exceeds the reference by much (Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
#pragma once

#include <cstdint>

#include "isa.h"

namespace vpd {

struct SelfAttentionPlan {
    const void *q, *k, *v;  // (batch, queries, heads * dim), (contexts, tokens, heads * dim); the last stride is 1
    void* out;              // (batch, queries, heads * dim); the last stride is 1
    bool bf16;              // element type of these four: bfloat16, otherwise float32
    int64_t batch, contexts, queries, tokens, heads, dim;          // contexts: different K and V, batch or 1
    int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2];  // image, row; in elements
    float scale;
};

// How a level divides the work.
struct SelfAttentionSizes {
    int64_t packed;   // floats of packed memory for one head of a context, a multiple of 16
    int64_t scratch;  // floats of scratch memory for one thread
    int64_t queries;  // that are worked on together: a part
};

}  // namespace vpd

// Work items of the first are (context, head), numbered context * heads + head; of the second (image, head, part),
// numbered (image * heads + head) * parts + part. They do [first, last). packed and scratch are aligned to 64 bytes;
// scratch belongs to one thread.
VPD_DECLARE_PER_ISA(::vpd::SelfAttentionSizes self_attention_sizes(const ::vpd::SelfAttentionPlan& plan);
                    void self_attention_pack(const ::vpd::SelfAttentionPlan& plan, float* packed, int64_t first,
                                             int64_t last);
                    void self_attention_parts(const ::vpd::SelfAttentionPlan& plan, const float* packed, int64_t first,
                                              int64_t last, float* scratch))
