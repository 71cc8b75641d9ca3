// labels[b, y, x] = argmax over c of  sum_{R, S} A[y, R] * B[x, S] * logits[b, c, R, S]
//
// A and B are sparse matrices with non-negative rows that add up to 1 (bilinear resizing; or windows resized, averaged
// and resized again). Rows of A with the same columns form a row group; columns of the output are cut into tiles.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vpd {

constexpr int64_t MAX_TAPS = 64;  // rows (or columns) of the logits that one output row (or column) may read

// Consecutive output rows which read the same rows of the logits.
struct RowGroup {
    int64_t first, count;    // output rows
    const int32_t* sources;  // [taps] rows R of the logits
    const float* weights;    // [count][taps]
    int64_t taps;
};

// At most 16 consecutive output columns, and the columns of the logits that any of them reads.
struct Tile {
    int64_t first, count;    // output columns
    const int32_t* sources;  // [points] columns S of the logits
    const float* weights;    // [points][16]: weight of each source in each output column, 0 where it is not read
    int64_t points;
};

struct UpsampleArgmaxPlan {
    // The logits are a grid of grid_y x grid_x windows, each of h x w; R = window row * h + r, S = window column * w + s.
    int64_t batch, channels, grid_y, grid_x, h, w;
    int64_t stride_batch, stride_window, stride_channel, stride_row, stride_column;  // in elements
    int64_t out_h, out_w;
    const RowGroup* groups;
    int64_t n_groups, max_taps;
    const Tile* tiles;
    int64_t n_tiles, max_points;
};

}  // namespace vpd

// Work items are (image, row group), numbered image * n_groups + group; this does [first, last). labels: (batch, out_h,
// out_w). scratch: aligned to 64 bytes, not shared between threads.
VPD_DECLARE_PER_ISA(void upsample_argmax_groups(const ::vpd::UpsampleArgmaxPlan& plan, const float* logits,
                                                int64_t* labels, int64_t first, int64_t last, float* scratch))
