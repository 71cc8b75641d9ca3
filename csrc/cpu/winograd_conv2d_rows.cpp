// Winograd convolution, first step: from the pixels of a block of tiles to rows of elements.
#include <type_traits>

#include "cpu/matrix_tile.h"
#include "cpu/row_prologue.h"
#include "cpu/winograd_conv2d.h"
#include "cpu/winograd_tile.h"

namespace vpd::VPD_ISA {
namespace {

constexpr float MIN_MAGNITUDE = 1e-30f;  // of a row of 8 bits: smaller numbers become zero

template <typename W, typename E>
class Transformer {
public:
    // continued: the first row is just below the one that the scratch was last used for.
    Transformer(const WinogradConv2dPlan& plan, int64_t block, bool continued, float* rows, float* scratch)
        : plan_(plan),
          block_(winograd_block(plan, block)),
          columns_(block_.last_column - block_.first_column),
          pixels_(columns_ * W::STEP + 2),
          line_(pixels_ * plan.pixel),
          rows_(rows),
          activated_(scratch),
          vertical_(scratch + W::IN * line_),
          continued_(continued) {}

    // Transforms a tile row of the block.
    void run(int64_t row) {
        const int64_t number = block_.first_row + row, image = number / plan_.tile_rows;
        const int64_t tile_row = number % plan_.tile_rows, y = tile_row * W::STEP - 1;
        const int64_t first = continued_ && tile_row > 0 ? W::IN - W::STEP : 0;  // the others are activated already
        for (int64_t i = first; i < W::IN; ++i) activate(image, y + i);
        for (int64_t column = 0; column < columns_; ++column) {
            for (int64_t x = column ? W::IN - W::STEP : 0; x < W::IN; ++x) transform_column(y, column * W::STEP + x);
            transform_tile(row * columns_ + column, column);
            if (tile_row + 1 < plan_.tile_rows) prefetch_below(image, y + W::IN, column);
        }
        continued_ = true;
    }

private:
    float* activated(int64_t y) const { return activated_ + (y + W::IN) % W::IN * line_; }

    // Activates the pixels of an image row that the block needs; zero outside of the image.
    void activate(int64_t image, int64_t y) {
        float* to = activated(y);
        const int64_t first = block_.first_column * W::STEP - 1;
        for (int64_t i = 0; i < pixels_; ++i, to += plan_.pixel) {
            const int64_t x = first + i;
            if (y < 0 || y >= plan_.height || x < 0 || x >= plan_.width) {
                clear_piece(to, plan_.padded_channels);
                continue;
            }
            activate_source(plan_.x[0], image, y, x, 0, to);
            if (plan_.x[1].data) activate_source(plan_.x[1], image, y, x, plan_.x[0].channels, to);
            if (plan_.k < plan_.padded_channels) store(to + plan_.k, broadcast(0.0f));
        }
    }

    void activate_source(const Source& source, int64_t image, int64_t y, int64_t x, int64_t channel, float* to) const {
        const int64_t offset = image * source.image + y * source.row + x * source.column;
        const float* affine = plan_.affine ? plan_.affine + image * 2 * plan_.k + channel : nullptr;
        const float* smoothing = plan_.smoothing ? plan_.smoothing + channel : nullptr;
        to += channel;
        source.bf16 ? activate_channels(static_cast<const uint16_t*>(source.data) + offset, source.channels, affine,
                                        smoothing, to)
                    : activate_channels(static_cast<const float*>(source.data) + offset, source.channels, affine,
                                        smoothing, to);
    }

    // Whole vectors are stored, also where fewer channels are left: there is room, and what follows is stored later.
    template <typename T>
    void activate_channels(const T* from, int64_t channels, const float* affine, const float* smoothing,
                           float* to) const {
        const bool smooth = plan_.silu;
        for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t left = channels - c;
            f32x16 a = load_some(from + c, left);
            if (affine) a = multiply_add(a, load_some(affine + c, left), load_some(affine + plan_.k + c, left));
            if (smooth) a = E::WIDTH == 1 ? silu(a) : rough_silu(a);
            if (smoothing) a = VPD_ISA::multiply(a, load_some(smoothing + c, left));
            store(to + c, a);
        }
    }

    // Prefetches the pixels that the tile below this one adds. Inline, because GCC drops calls of functions that do nothing else.
    __attribute__((always_inline)) void prefetch_below(int64_t image, int64_t y, int64_t column) const {
        const int64_t first = (block_.first_column + column) * W::STEP;
        for (const Source& source : plan_.x)
            for (int64_t i = 0; source.data && i < W::STEP && y + i < plan_.height; ++i)
                for (int64_t j = 0; j < W::STEP && first + j < plan_.width; ++j) {
                    const int64_t size = source.bf16 ? 2 : 4;
                    const int64_t at_pixel = image * source.image + (y + i) * source.row + (first + j) * source.column;
                    const char* from = static_cast<const char*>(source.data) + at_pixel * size;
                    for (int64_t at = 0; at < source.channels * size; at += 64) __builtin_prefetch(from + at, 0, 2);
                }
    }

    // A column of pixels after the vertical transform. As many columns as a tile has are kept.
    float* vertical(int64_t x) const { return vertical_ + x % W::IN * W::POINTS * plan_.pixel; }

    void transform_column(int64_t y, int64_t x) const {
        const float* from[W::IN];
        for (int i = 0; i < W::IN; ++i) from[i] = activated(y + i) + x * plan_.pixel;
        float* to = vertical(x);
        for (int64_t c = 0; c < plan_.padded_channels; c += LANES) {
            f32x16 d[W::IN], t[W::POINTS];
#pragma GCC unroll 6
            for (int i = 0; i < W::IN; ++i) d[i] = load_once(from[i] + c);
            W::input(d, t);
#pragma GCC unroll 6
            for (int i = 0; i < W::POINTS; ++i) store(to + i * plan_.pixel + c, t[i]);
        }
    }

    // A tile's columns after the vertical transform.
    struct Columns {
        const float* of[W::IN];
    };

    // Calls use(matrix, transformed inputs of 16 channels) for all matrices of a tile.
    template <typename Use>
    static __attribute__((always_inline)) void each_matrix(const Columns& from, int64_t c, int64_t line, Use use) {
#pragma GCC unroll 6
        for (int i = 0; i < W::POINTS; ++i) {
            f32x16 d[W::IN], t[W::POINTS];
#pragma GCC unroll 6
            for (int j = 0; j < W::IN; ++j) d[j] = load_once(from.of[j] + i * line + c);
            W::input(d, t);
#pragma GCC unroll 6
            for (int j = 0; j < W::POINTS; ++j) use(i * W::POINTS + j, t[j]);
        }
    }

    void transform_tile(int64_t tile, int64_t column) const {
        const int64_t pixel = plan_.pixel, channels = plan_.padded_channels, stride = plan_.matrix_stride;
        Columns from;
        for (int j = 0; j < W::IN; ++j) from.of[j] = vertical(column * W::STEP + j);
        float* to = rows_ + tile * plan_.row;
        if constexpr (E::WIDTH == 4) {
            float inverses[PADDED_SCALES];
            find_scales(tile, from, inverses);
            auto* bytes = reinterpret_cast<uint8_t*>(to);
            for (int64_t c = 0; c < channels; c += LANES)
                each_matrix(from, c, pixel, [&](int i, f32x16 t) __attribute__((always_inline)) {
                    store_signed_as_u8(bytes + i * 4 * stride + c, t, broadcast(inverses[i]));
                });
        } else {
            using T = std::conditional_t<E::WIDTH == 1, float, uint16_t>;
            auto* numbers = reinterpret_cast<T*>(to);
            for (int64_t c = 0; c < channels; c += LANES)
                each_matrix(from, c, pixel, [&](int i, f32x16 t) __attribute__((always_inline)) {
                    store(numbers + i * E::WIDTH * stride + c, t);
                });
        }
    }

    // Stores the scale of each matrix, largest magnitude / 127, and finds its inverse.
    void find_scales(int64_t tile, const Columns& from, float* inverses) const {
        const int64_t pixel = plan_.pixel, channels = plan_.padded_channels;
        f32x16 maxima[PADDED_SCALES];
#pragma GCC unroll 48
        for (int i = 0; i < PADDED_SCALES; ++i) maxima[i] = broadcast(0.0f);
        for (int64_t c = 0; c < channels; c += LANES)
            each_matrix(from, c, pixel, [&](int i, f32x16 t) __attribute__((always_inline)) {
                maxima[i] = larger_magnitude(t, maxima[i]);
            });
        float scales[PADDED_SCALES];
        for (int i = 0; i < PADDED_SCALES; i += LANES) {
            // Not zero, and NaN if it is not finite: then so are the results.
            f32x16 largest = max(broadcast(MIN_MAGNITUDE), largest_of_each(maxima + i));
            largest = add(largest, subtract(largest, largest));
            store(scales + i, VPD_ISA::multiply(largest, broadcast(1.0f / 127.0f)));
            store(inverses + i, divide(broadcast(127.0f), largest));
        }
        float* row_scales = rows_ + plan_.scales_offset + tile;
        for (int i = 0; i < W::POINTS * W::POINTS; ++i) row_scales[i * MAX_TILES] = scales[i];
    }

    static constexpr int PADDED_SCALES = padded(W::POINTS * W::POINTS);

    const WinogradConv2dPlan& plan_;
    const WinogradBlock block_;
    const int64_t columns_, pixels_, line_;  // tiles and pixels of a row; floats of an activated row
    float* const rows_;
    float *const activated_, *const vertical_;  // [row][pixel][channel], [column][point][channel]
    bool continued_;
};

}  // namespace

void winograd_conv2d_transform(const WinogradConv2dPlan& plan, int64_t block, int64_t first, int64_t last,
                               bool continued, float* rows, float* scratch) {
    with_types(plan, [&](auto transform, auto element) {
        Transformer<decltype(transform), decltype(element)> transformer(plan, block, continued, rows, scratch);
        for (int64_t row = first; row < last; ++row) transformer.run(row);
    });
}

}  // namespace vpd::VPD_ISA
