// Argmax over channels of a separable resize, without the resized logits.
//
// A resized value is a convex combination of the logits ("points") around it, so within one tile of output pixels a
// channel can only win if its largest point is not below the best channel's smallest point. That discards all but a few
// channels of real logits before any interpolation; a tile with one channel left needs none at all. The bounds include
// the rounding of the interpolation, so the labels are those of the full computation, bit for bit.
#include "cpu/upsample_argmax.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/simd.h"

namespace vpd::VPD_ISA {
namespace {

// Scratch memory of one thread, which the binding sizes.
struct Scratch {
    float* rows;     // [max_taps][columns][channels]  packed rows of the logits, channels innermost
    float* upper;    // [channels]                     what a channel's value in the tile cannot exceed
    float* lowest;   // [channels]                     its smallest point
    float* points;   // [max_taps][max_points][channels]  points of the channels that are left
    float* blended;  // [max_points][channels]         the same for one output row
    int32_t* kept;   // [channels]                     the channels that are left, ascending
};

Scratch divide(const UpsampleArgmaxPlan& plan, float* memory) {
    const int64_t channels = padded(plan.channels), columns = plan.grid_x * plan.w;
    Scratch s;
    s.rows = memory;
    s.upper = s.rows + plan.max_taps * columns * channels;
    s.lowest = s.upper + channels;
    s.points = s.lowest + channels;
    s.blended = s.points + plan.max_taps * plan.max_points * channels;
    s.kept = reinterpret_cast<int32_t*>(s.blended + plan.max_points * channels);
    return s;
}

// Packs row R of all windows beside it: to[S][c]. Channels beyond the last are -infinity: they never win.
void pack_row(const UpsampleArgmaxPlan& plan, const float* image, int64_t row, float* to) {
    const int64_t C = plan.channels, channels = padded(C), w = plan.w;
    const int64_t sc = plan.stride_channel, ss = plan.stride_column;
    for (int64_t window = 0; window < plan.grid_x; ++window, to += w * channels) {
        const float* from =
            image + (row / plan.h * plan.grid_x + window) * plan.stride_window + row % plan.h * plan.stride_row;
        const int64_t c4 = ss == 1 ? C / 4 * 4 : 0, w4 = w / 4 * 4;
        for (int64_t c = 0; c < c4; c += 4)
            for (int64_t s = 0; s < w4; s += 4) transpose_4x4(from + c * sc + s, sc, to + s * channels + c, channels);
        for (int64_t s = 0; s < w; ++s) {
            const int64_t done = s < w4 ? c4 : 0;
            for (int64_t c = done; c < C; ++c) to[s * channels + c] = from[c * sc + s * ss];
            for (int64_t c = C; c < channels; ++c) to[s * channels + c] = -INFINITY;
        }
    }
}

// The packed rows of the last row groups, so that a row shared by neighbouring groups is packed once.
struct RowCache {
    const UpsampleArgmaxPlan& plan;
    float* memory;
    int64_t row_of_slot[MAX_TAPS];  // -1: empty

    void clear() {
        for (int64_t& row : row_of_slot) row = -1;
    }

    // Fills slots[tap] with the packed rows of a group.
    void fetch(const float* image, const RowGroup& group, const float** slots) {
        const int64_t slot_size = plan.grid_x * plan.w * padded(plan.channels);
        bool in_use[MAX_TAPS] = {};
        for (int64_t tap = 0; tap < group.taps; ++tap) {
            slots[tap] = nullptr;
            for (int64_t slot = 0; slot < plan.max_taps; ++slot)
                if (row_of_slot[slot] == group.sources[tap]) {
                    slots[tap] = memory + slot * slot_size;
                    in_use[slot] = true;
                }
        }
        int64_t free_slot = 0;
        for (int64_t tap = 0; tap < group.taps; ++tap) {
            if (slots[tap]) continue;
            while (in_use[free_slot]) ++free_slot;
            in_use[free_slot] = true;
            row_of_slot[free_slot] = group.sources[tap];
            float* packed = memory + free_slot * slot_size;
            pack_row(plan, image, group.sources[tap], packed);
            slots[tap] = packed;
        }
    }
};

// Finds the channels that can win somewhere in (group x tile). Returns how many; *special is set if one of them has a
// point that is NaN or infinite.
int64_t keep_possible_winners(const RowGroup& group, const Tile& tile, const float* const* rows, int64_t channels,
                              const Scratch& scratch, bool* special) {
    // |computed - exact| <= (taps + points + 1) rounding errors, relative to the channel's largest magnitude; twice that
    // for weights that add up to 1 only after rounding, and as much again to be generous. 1e-30 covers underflow.
    const f32x16 slack = broadcast(4.0f * static_cast<float>(group.taps + tile.points + 1) * (FLT_EPSILON / 2));
    const f32x16 largest = broadcast(FLT_MAX), tiny = broadcast(1e-30f);
    f32x16 bound = broadcast(-INFINITY);
    for (int64_t c = 0; c < channels; c += LANES) {
        f32x16 low = broadcast(INFINITY), high = broadcast(-INFINITY), sum = broadcast(0.0f);
        for (int64_t tap = 0; tap < group.taps; ++tap)
            for (int64_t point = 0; point < tile.points; ++point) {
                const f32x16 x = load(rows[tap] + tile.sources[point] * channels + c);
                low = min(x, low), high = max(x, high), sum = add(sum, x);
            }
        const f32x16 magnitude = min(max(absolute(low), absolute(high)), largest);
        const f32x16 error = multiply(slack, add(magnitude, tiny));
        // A NaN among the points always stays: `not_less` below is true for NaN.
        store(scratch.upper + c, select(is_nan(sum), sum, add(high, error)));
        store(scratch.lowest + c, select(is_nan(sum), sum, low));
        bound = max(subtract(low, error), bound);
    }
    bound = broadcast(reduce_max(bound));
    int64_t kept = 0;
    uint32_t any_special = 0;
    for (int64_t c = 0; c < channels; c += LANES) {
        const f32x16 upper = load(scratch.upper + c);
        uint32_t possible = bits(not_less(upper, bound));
        if (!possible) continue;
        const f32x16 infinity = broadcast(INFINITY);
        any_special |= possible & ~(bits(greater(infinity, upper)) &
                                    bits(greater(load(scratch.lowest + c), broadcast(-INFINITY))));
        for (; possible; possible &= possible - 1)
            scratch.kept[kept++] = static_cast<int32_t>(c) + __builtin_ctz(possible);
    }
    *special = any_special != 0;
    return kept;
}

// Copies the points of the kept channels together: to[tap][point][kept channel], zero up to a multiple of 16 channels.
void gather_points(const RowGroup& group, const Tile& tile, const float* const* rows, int64_t channels, int64_t kept,
                   const int32_t* kept_channels, float* to) {
    for (int64_t tap = 0; tap < group.taps; ++tap)
        for (int64_t point = 0; point < tile.points; ++point, to += padded(kept)) {
            const float* from = rows[tap] + tile.sources[point] * channels;
            for (int64_t j = 0; j < kept; ++j) to[j] = from[kept_channels[j]];
            for (int64_t j = kept; j < padded(kept); ++j) to[j] = 0.0f;
        }
}

// Vertical interpolation: to[point][channel] = sum over taps of weight * from[tap][point][channel].
void blend_rows(const float* from, const float* weights, int64_t taps, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += LANES) {
        f32x16 sum = multiply(broadcast(weights[0]), load(from + i));
        for (int64_t tap = 1; tap < taps; ++tap)
            sum = multiply_add(broadcast(weights[tap]), load(from + tap * size + i), sum);
        store(to + i, sum);
    }
}

// Horizontal interpolation and argmax of one output row of the tile. POINTS is tile.points, or 0 for any number.
// SPECIAL: there may be infinities and NaN. Then a weight of zero must not turn an infinity into a NaN, and NaN wins.
template <int POINTS, bool SPECIAL>
i32x16 argmax_of_row(const Tile& tile, const float* blended, const int32_t* kept_channels, int64_t kept) {
    const int64_t points = POINTS ? POINTS : tile.points, channels = padded(kept);
    f32x16 best = broadcast(-INFINITY);
    i32x16 label = broadcast(kept_channels[0]);
    for (int64_t j = 0; j < kept; ++j) {
        f32x16 value = broadcast(0.0f);
        for (int64_t point = 0; point < points; ++point) {
            const f32x16 weight = load(tile.weights + point * LANES), x = broadcast(blended[point * channels + j]);
            if (SPECIAL)
                value = select(nonzero(weight), multiply_add(weight, x, value), value);
            else
                value = point ? multiply_add(weight, x, value) : multiply(weight, x);
        }
        Mask wins = greater(value, best);
        if (SPECIAL) wins = and_not(either(wins, is_nan(value)), is_nan(best));
        label = select(wins, broadcast(kept_channels[j]), label);
        best = SPECIAL ? select(wins, value, best) : max(value, best);
    }
    return label;
}

VPD_INLINE void store_labels(int64_t* to, i32x16 labels, int64_t count) {
    if (count == LANES) return store_widened(to, labels);
    int64_t all[LANES];
    store_widened(all, labels);
    for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

using RowFunction = i32x16 (*)(const Tile&, const float*, const int32_t*, int64_t);

RowFunction row_function(int64_t points, bool special) {
    if (special) return argmax_of_row<0, true>;
    switch (points) {
        case 1: return argmax_of_row<1, false>;
        case 2: return argmax_of_row<2, false>;
        case 3: return argmax_of_row<3, false>;
        case 4: return argmax_of_row<4, false>;
        default: return argmax_of_row<0, false>;
    }
}

// labels: of the group's first output row.
void label_tile(const UpsampleArgmaxPlan& plan, const RowGroup& group, const Tile& tile, const float* const* rows,
                const Scratch& scratch, int64_t* labels) {
    const int64_t channels = padded(plan.channels);
    bool special = false;
    const int64_t kept = keep_possible_winners(group, tile, rows, channels, scratch, &special);
    labels += tile.first;
    if (kept == 1) {
        const i32x16 label = broadcast(scratch.kept[0]);
        for (int64_t y = 0; y < group.count; ++y) store_labels(labels + y * plan.out_w, label, tile.count);
        return;
    }
    gather_points(group, tile, rows, channels, kept, scratch.kept, scratch.points);
    const RowFunction argmax = row_function(tile.points, special);
    for (int64_t y = 0; y < group.count; ++y) {
        blend_rows(scratch.points, group.weights + y * group.taps, group.taps, tile.points * padded(kept),
                   scratch.blended);
        store_labels(labels + y * plan.out_w, argmax(tile, scratch.blended, scratch.kept, kept), tile.count);
    }
}

}  // namespace

void upsample_argmax_groups(const UpsampleArgmaxPlan& plan, const float* logits, int64_t* labels, int64_t first,
                            int64_t last, float* memory) {
    const Scratch scratch = divide(plan, memory);
    const float* rows[MAX_TAPS];
    RowCache cache{plan, scratch.rows, {}};
    for (int64_t item = first, image = -1; item < last; ++item) {
        const RowGroup& group = plan.groups[item % plan.n_groups];
        if (item / plan.n_groups != image) {
            image = item / plan.n_groups;
            cache.clear();
        }
        cache.fetch(logits + image * plan.stride_batch, group, rows);
        int64_t* group_labels = labels + (image * plan.out_h + group.first) * plan.out_w;
        for (int64_t t = 0; t < plan.n_tiles; ++t) label_tile(plan, group, plan.tiles[t], rows, scratch, group_labels);
    }
}

}  // namespace vpd::VPD_ISA
