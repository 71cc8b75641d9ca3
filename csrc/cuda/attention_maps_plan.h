// How blocks share the heads of a tile of queries, and what becomes of the sums over heads: host code for all kernels
// of cross_attention_maps.
#pragma once

#include "cuda/cross_attention_maps.h"

namespace vpd::attention_maps {

constexpr int MAX_CLUSTER = 8;  // the most that every device with clusters takes

// How a block stores the sum over its heads.
enum class HeadSum { nothing, write, cluster, partial };

struct MapsPlan {
    int groups;  // blocks that share the heads of a tile
    HeadSum head_sum;
    int64_t tiles_per_image;
    int columns;      // of the maps
    bool token_rows;  // each token is a column, in float32 and next to the one before: a warp can write a row
    float factor;     // by which sums over heads are multiplied
};

// Later devices run what was compiled for sm_80, without clusters.
inline bool has_clusters() { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

inline int64_t tiles_of(const CudaCrossAttentionMaps& p, const MapsPlan& plan) {
    return p.batch * plan.tiles_per_image;
}

// Sets what does not depend on how many blocks share a tile.
inline void plan_columns(const CudaCrossAttentionMaps& p, MapsPlan& plan) {
    plan.columns = int(p.category_offsets ? p.categories : p.tokens);
    plan.token_rows = !p.category_offsets && p.maps_dtype == CudaFloat::float32 && p.maps_strides.column == 1 &&
                      (!p.addend || p.addend_strides.column == 1);
    plan.factor = p.average_heads ? p.weight / float(p.heads) : p.weight;
}

// Maps of each head, or of a single one: its blocks write them.
inline bool heads_are_apart(const CudaCrossAttentionMaps& p) { return !p.average_heads || p.heads == 1; }

}  // namespace vpd::attention_maps
