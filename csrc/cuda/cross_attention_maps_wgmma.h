// The same operator as in cross_attention_maps.h, with wgmma and TMA: all tokens are one block of keys, of which there
// are at most 160. Only where maps are wanted; without them self_attention.h has a kernel.
#pragma once

#include "cuda/cross_attention_maps.h"

namespace vpd {

// nullptr if the operator can run on the current device, else the reason why it cannot.
const char* cross_attention_maps_wgmma_refuses(const CudaCrossAttentionMaps& problem, CudaFloat dtype,
                                               CudaSchedule schedule);

// Enqueues on the stream of the current device; returns the launch's error, or cudaErrorInvalidValue if the operator
// refuses. warpgroups: of a block, of 64 queries each, 1 or 2; 0: chosen. More than 80 tokens with more than 80
// elements per head need 2.
cudaError_t cross_attention_maps_wgmma(const CudaCrossAttentionMaps& problem, CudaFloat dtype, CudaSchedule schedule,
                                       int warpgroups, cudaStream_t stream);

}  // namespace vpd
