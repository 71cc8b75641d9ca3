// Attention of queries to keys without maps: out_h = softmax(scale q_h k_h^T) v_h for each head h.
//
// Products of 16-bit elements on tensor cores, everything else in float32; the probabilities are rounded to 16 bits for
// their product with v only. Bitwise repeatable.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/attention_rows.h"
#include "cuda/device.h"

namespace vpd {

struct CudaSelfAttention {
    int64_t batch, queries, keys, heads, head_dim;
    CudaRows q, k, v;  // read only; addresses and strides are multiples of 16 bytes
    CudaRows out;      // of the same type; address and strides are multiples of 4 bytes
    float scale;
    // (heads * head_dim) or null: out is then int8, round(result * round_factors + round_shifts) to nearest, ties to even,
    // within -128 ... 127, NaN as -128; address and strides are multiples of 2.
    const float *round_factors, *round_shifts;
};

// How a warpgroup orders the products and the softmax of blocks of keys.
enum class CudaAttentionOrder {
    automatic,
    sequential,  // one after the other; other warpgroups fill the gaps
    overlapped,  // the softmax of a block runs beside the second product of the block before
    polynomial,  // the same, and one of 8 exponentials is a polynomial, within 1e-4; heads of up to 40 elements only
};

// nullptr if the operator can run on the current device, else the reason why it cannot.
const char* self_attention_cuda_refuses(const CudaSelfAttention& problem, CudaFloat dtype, CudaAttentionOrder order);

// Enqueues on the stream of the current device; returns the launch's error, or cudaErrorInvalidValue if the operator
// refuses. groups: warpgroups that compute in a block, of 64 queries each; 0: chosen.
cudaError_t self_attention_cuda(const CudaSelfAttention& problem, CudaFloat dtype, CudaAttentionOrder order, int groups,
                                cudaStream_t stream);

}  // namespace vpd
