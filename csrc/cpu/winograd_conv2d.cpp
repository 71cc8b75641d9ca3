// Winograd convolution of a block of tiles: from pixels to rows of elements, and from their products to pixels.
#include "cpu/winograd_conv2d.h"

#include <cstring>
#include <type_traits>

#include "cpu/elementwise.h"
#include "cpu/matrix_tile.h"
#include "cpu/row_prologue.h"
#include "cpu/winograd_tile.h"

namespace vpd::VPD_ISA {
namespace {

// --- from pixels to rows of elements ---------------------------------------------------------------------------------

template <typename W, typename E>
class Transformer {
public:
    Transformer(const WinogradConv2dPlan& plan, int64_t block, float* rows, float* scratch)
        : plan_(plan),
          rows_(rows),
          first_column_(winograd_block(plan, block).first_column),
          columns_(winograd_block(plan, block).last_column - first_column_),
          pixels_(columns_ * W::STEP + 2),
          line_(pixels_ * plan.pixel),
          activated_(scratch),
          vertical_(scratch + W::IN * line_) {}

    // Tile row `row` of the block, which is `number` of all images. Consecutive ones share pixels.
    void run(int64_t row, int64_t number) {
        const int64_t image = number / plan_.tile_rows, y = number % plan_.tile_rows * W::STEP - 1;
        const int64_t kept = number == next_ && y > 0 ? W::IN - W::STEP : 0;
        for (int64_t i = kept; i < W::IN; ++i) activate(image, y + i);
        transform_vertically(y);
        for (int64_t column = 0; column < columns_; ++column) transform_tile(row * columns_ + column, column);
        next_ = number + 1;
    }

private:
    float* activated(int64_t y) const { return activated_ + (y + W::IN) % W::IN * line_; }

    // The pixels of an image row that the block needs, as they enter the convolution; zero outside of the image.
    void activate(int64_t image, int64_t y) {
        float* to = activated(y);
        const int64_t first = first_column_ * W::STEP - 1;
        for (int64_t i = 0; i < pixels_; ++i, to += plan_.pixel) {
            const int64_t x = first + i;
            if (y < 0 || y >= plan_.height || x < 0 || x >= plan_.width) {
                clear_piece(to, plan_.padded_channels);
                continue;
            }
            activate_source(plan_.x, image, y, x, 0, to);
            if (plan_.x2.data) activate_source(plan_.x2, image, y, x, plan_.x.channels, to);
            if (plan_.channels < plan_.padded_channels) store(to + plan_.channels, broadcast(0.0f));
        }
    }

    void activate_source(const Source& source, int64_t image, int64_t y, int64_t x, int64_t channel, float* to) const {
        const int64_t offset = image * source.image + y * source.row + x * source.column;
        const float* affine = plan_.affine ? plan_.affine + image * 2 * plan_.channels : nullptr;
        const Transform t{affine, affine ? affine + plan_.channels : nullptr, plan_.silu, plan_.factor};
        transform_piece(source, offset, source.channels, t.from(channel), to + channel, nullptr);
    }

    void transform_vertically(int64_t y) {
        const float* from[W::IN];
        for (int i = 0; i < W::IN; ++i) from[i] = activated(y + i);
        for (int64_t at = 0; at < line_; at += plan_.pixel)
            for (int64_t c = at; c < at + plan_.padded_channels; c += LANES) {
                F16 d[W::IN], t[W::TAPS];
                for (int i = 0; i < W::IN; ++i) d[i] = load(from[i] + c);
                W::input(d, t);
                for (int i = 0; i < W::TAPS; ++i) store(vertical_ + i * line_ + c, t[i]);
            }
    }

    // The factors of 16 channels, row i of the taps, of the tile that starts at `from`.
    static __attribute__((always_inline)) void transform_horizontally(const float* from, int i, F16* t, int64_t line, int64_t pixel) {
        F16 d[W::IN];
#pragma GCC unroll 6
        for (int j = 0; j < W::IN; ++j) d[j] = load(from + i * line + j * pixel);
        W::input(d, t);
    }

    void transform_tile(int64_t tile, int64_t column) {
        const int64_t line = line_, pixel = plan_.pixel, channels = plan_.padded_channels, tap = plan_.tap;
        const float* from = vertical_ + column * W::STEP * pixel;
        float* to = rows_ + tile * plan_.row;
        if constexpr (E::WIDTH == 4) {
            alignas(64) float inverses[SCALES_OF_TILE];
            find_scales(from, rows_ + plan_.scales_offset + tile * SCALES_OF_TILE, inverses);
            auto* bytes = reinterpret_cast<uint8_t*>(to);
            for (int64_t c = 0; c < channels; c += LANES)
#pragma GCC unroll 6
                for (int i = 0; i < W::TAPS; ++i) {
                    F16 t[W::TAPS];
                    transform_horizontally(from + c, i, t, line, pixel);
#pragma GCC unroll 6
                    for (int j = 0; j < W::TAPS; ++j) {
                        const F16 inverse = broadcast(inverses[i * W::TAPS + j]);
                        store_u8(bytes + (i * W::TAPS + j) * 4 * tap + c, multiply_add(t[j], inverse, broadcast(128.0f)));
                    }
                }
        } else {
            using T = std::conditional_t<E::WIDTH == 1, float, uint16_t>;
            auto* numbers = reinterpret_cast<T*>(to);
            for (int64_t c = 0; c < channels; c += LANES)
#pragma GCC unroll 6
                for (int i = 0; i < W::TAPS; ++i) {
                    F16 t[W::TAPS];
                    transform_horizontally(from + c, i, t, line, pixel);
#pragma GCC unroll 6
                    for (int j = 0; j < W::TAPS; ++j) store(numbers + (i * W::TAPS + j) * E::WIDTH * tap + c, t[j]);
                }
        }
    }

    // Scales of a tile, largest magnitude / 127 for each tap, and one over them.
    void find_scales(const float* from, float* scales, float* inverses) {
        const int64_t line = line_, pixel = plan_.pixel;
        constexpr int COUNT = (W::TAPS * W::TAPS + LANES - 1) / LANES * LANES;
        F16 most[COUNT];
#pragma GCC unroll 48
        for (int i = 0; i < COUNT; ++i) most[i] = broadcast(0.0f);
        for (int64_t c = 0; c < plan_.padded_channels; c += LANES)
#pragma GCC unroll 6
            for (int i = 0; i < W::TAPS; ++i) {
                F16 t[W::TAPS];
                transform_horizontally(from + c, i, t, line, pixel);
#pragma GCC unroll 6
                for (int j = 0; j < W::TAPS; ++j)
                    most[i * W::TAPS + j] = larger_magnitude(t[j], most[i * W::TAPS + j]);
            }
        for (int i = 0; i < COUNT; i += LANES) {
            // Not zero, and NaN if it is not finite: then so are the results.
            F16 largest = max(broadcast(1e-30f), largest_of_each(most + i));
            largest = add(largest, subtract(largest, largest));
            store(scales + i, VPD_ISA::multiply(largest, broadcast(1.0f / 127.0f)));
            store(inverses + i, divide(broadcast(127.0f), largest));
        }
    }

    const WinogradConv2dPlan& plan_;
    float* const rows_;
    const int64_t first_column_, columns_, pixels_, line_;  // line_: floats of an activated row
    float *const activated_, *const vertical_;              // [row of the tile or of taps][pixel][channel]
    int64_t next_ = -1;                                     // tile row whose first pixels are activated already
};

// --- from products to pixels -----------------------------------------------------------------------------------------

VPD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename W, typename E>
class Multiplier {
public:
    Multiplier(const WinogradConv2dPlan& plan, int64_t block, const float* rows, float* scratch)
        : plan_(plan),
          rows_(rows),
          products_(scratch),
          block_(winograd_block(plan, block)),
          columns_(block_.last_column - block_.first_column),
          tiles_((block_.last_row - block_.first_row) * columns_) {
        Tile* tile = places_;
        for (int64_t row = block_.first_row; row < block_.last_row; ++row)
            for (int64_t column = block_.first_column; column < block_.last_column; ++column)
                *tile++ = place_of(row, column);
    }

    void run(int64_t panel) {
        first_ = panel * PANEL;
        load_columns();
        const int64_t size = plan_.elements, parts = (tiles_ + MOST_ROWS - 1) / MOST_ROWS;
        const int64_t pixel_rows = tiles_ * W::OUT, steps = plan_.taps * parts;
        for (int64_t tap = 0, step = 0; tap < plan_.taps; ++tap) {
            const float* weight = plan_.weight + (tap * plan_.panels + panel) * size * PANEL;
            for (int64_t part = 0; part < parts; ++part, ++step) {
                for (int64_t i = pixel_rows * step / steps; i < pixel_rows * (step + 1) / steps; ++i) prefetch_pixels(i);
                const int64_t first = tiles_ * part / parts, count = tiles_ * (part + 1) / parts - first;
                VPD_ISA::multiply<E>(count, Factors{rows_ + tap * plan_.tap + first * plan_.row, plan_.row, 1}, weight,
                                     size, products_ + tap * plan_.product_tap + first * PANEL, PANEL);
            }
        }
        for (int64_t tile = 0; tile < tiles_; ++tile)
            for (int64_t column = 0; column < PANEL && first_ + column < plan_.n; column += LANES)
                store_tile(tile, column);
    }

private:
    // Where the pixels of a tile are stored, and how many of them are inside of the image.
    struct Tile {
        int64_t out, residual, rows, columns;
    };

    Tile place_of(int64_t row, int64_t column) const {
        const int64_t image = row / plan_.tile_rows, y = row % plan_.tile_rows * W::OUT, x = column * W::OUT;
        const Source& r = plan_.residual;
        return {image * plan_.out_image + y * plan_.out_row + x * plan_.out_column,
                image * r.image + y * r.row + x * r.column, smaller(W::OUT, plan_.out_height - y),
                smaller(W::OUT, plan_.out_width - x)};
    }

    // Memory that store_tile will touch, row by row of the tiles' pixels: short pieces that are far apart, which the
    // hardware does not foresee. Inline, because GCC drops calls of functions that do nothing but this.
    __attribute__((always_inline)) void prefetch_pixels(int64_t pixel_row) const {
        const Tile& tile = places_[pixel_row / W::OUT];
        const int64_t i = pixel_row % W::OUT;
        if (i >= tile.rows) return;
        const int64_t out_size = plan_.out_bf16 ? 2 : 4, residual_size = plan_.residual.bf16 ? 2 : 4;
        for (int64_t j = 0; j < tile.columns; ++j) {
            const auto* out = static_cast<const char*>(plan_.out) +
                              (tile.out + i * plan_.out_row + j * plan_.out_column + first_) * out_size;
            for (int64_t at = 0; at < PANEL * out_size; at += 64) __builtin_prefetch(out + at, 1);
            if (!plan_.residual.data) continue;
            const auto* residual =
                static_cast<const char*>(plan_.residual.data) +
                (tile.residual + i * plan_.residual.row + j * plan_.residual.column + first_) * residual_size;
            for (int64_t at = 0; at < PANEL * residual_size; at += 64) __builtin_prefetch(residual + at);
        }
    }

    // What the panel's columns need, zero beyond the last.
    void load_columns() {
        const int64_t count = plan_.n - first_ < PANEL ? plan_.n - first_ : PANEL;
        std::memset(bias_, 0, sizeof bias_);
        if (plan_.bias) std::memcpy(bias_, plan_.bias + first_, static_cast<size_t>(count) * sizeof(float));
        if (E::WIDTH != 4) return;
        std::memset(scales_, 0, sizeof scales_);
        std::memset(sums_, 0, sizeof sums_);
        for (int tap = 0; tap < plan_.taps; ++tap)
            for (int64_t i = 0; i < count; ++i) {
                scales_[tap][i] = plan_.scales[tap * plan_.n + first_ + i];
                sums_[tap][i] = 128 * static_cast<int32_t>(plan_.sums[tap * plan_.n + first_ + i]);
            }
    }

    __attribute__((always_inline)) F16 product(const float* from, const float* scales, int tap, int64_t column, int64_t stride) const {
        const F16 m = load(from + tap * stride);
        if constexpr (E::WIDTH == 4) {
            const F16 scale = VPD_ISA::multiply(load(scales_[tap] + column), broadcast(scales[tap]));
            return VPD_ISA::multiply(from_int32(subtract_int32(m, sums_[tap] + column)), scale);
        }
        return m;
    }

    void store_tile(int64_t tile, int64_t column) const {
        const float* from = products_ + tile * PANEL + column;
        const float* scales = rows_ + plan_.scales_offset + tile * SCALES_OF_TILE;
        const int64_t stride = plan_.product_tap;
        F16 half[W::OUT][W::TAPS];
#pragma GCC unroll 6
        for (int j = 0; j < W::TAPS; ++j) {
            F16 m[W::TAPS], y[W::OUT];
#pragma GCC unroll 6
            for (int i = 0; i < W::TAPS; ++i) m[i] = product(from, scales, i * W::TAPS + j, column, stride);
            W::output(m, y);
#pragma GCC unroll 4
            for (int i = 0; i < W::OUT; ++i) half[i][j] = y[i];
        }
        const Tile& place = places_[tile];
        const F16 bias = load(bias_ + column);
#pragma GCC unroll 4
        for (int64_t i = 0; i < W::OUT; ++i) {
            if (i >= place.rows) break;
            F16 pixels[W::OUT];
            W::output(half[i], pixels);
            const int64_t out = place.out + i * plan_.out_row + first_ + column;
            const int64_t residual = place.residual + i * plan_.residual.row + first_ + column;
#pragma GCC unroll 4
            for (int64_t j = 0; j < W::OUT; ++j)
                if (j < place.columns)
                    store_pixel(add(pixels[j], bias), out + j * plan_.out_column, residual + j * plan_.residual.column,
                                plan_.n - first_ - column);
        }
    }

    // count: channels from this one to the last.
    __attribute__((always_inline)) void store_pixel(F16 a, int64_t out, int64_t residual, int64_t count) const {
        if (plan_.activation == Activation::relu)
            a = max(broadcast(0.0f), a);  // NaN stays
        else if (plan_.activation == Activation::silu)
            a = silu(a);
        if (plan_.residual.data)
            a = add(a, plan_.residual.bf16
                           ? load_some(static_cast<const uint16_t*>(plan_.residual.data) + residual, count)
                           : load_some(static_cast<const float*>(plan_.residual.data) + residual, count));
        plan_.out_bf16 ? store_some(static_cast<uint16_t*>(plan_.out) + out, a, count)
                       : store_some(static_cast<float*>(plan_.out) + out, a, count);
    }

    template <typename T>
    VPD_INLINE void store_some(T* to, F16 a, int64_t count) {
        count < LANES ? store_part(to, a, count) : store(to, a);
    }

    const WinogradConv2dPlan& plan_;
    const float* const rows_;
    float* const products_;
    const WinogradBlock block_;
    const int64_t columns_, tiles_;
    int64_t first_ = 0;  // column of the panel
    Tile places_[MOST_TILES_OF_BLOCK];
    float bias_[PANEL], scales_[MOST_TAPS][PANEL];
    int32_t sums_[MOST_TAPS][PANEL];  // times 128
};

template <typename W, typename E>
void transform(const WinogradConv2dPlan& plan, int64_t block, int64_t first, int64_t last, float* rows, float* scratch) {
    Transformer<W, E> transformer(plan, block, rows, scratch);
    for (int64_t row = first; row < last; ++row) transformer.run(row, winograd_block(plan, block).first_row + row);
}

template <typename W, typename E>
void multiply_panels(const WinogradConv2dPlan& plan, int64_t block, int64_t first, int64_t last, const float* rows,
                     float* scratch) {
    Multiplier<W, E> multiplier(plan, block, rows, scratch);
    for (int64_t panel = first; panel < last; ++panel) multiplier.run(panel);
}

// Calls FUNCTION<transform of the plan, element of the plan>(plan, ...).
#define VPD_WITH_ELEMENT(FUNCTION, W, PLAN, ...)                                            \
    ((PLAN).precision == Precision::float32    ? FUNCTION<W, Single>(PLAN, __VA_ARGS__)     \
     : (PLAN).precision == Precision::bfloat16 ? FUNCTION<W, Pair>(PLAN, __VA_ARGS__)       \
                                               : FUNCTION<W, Quad>(PLAN, __VA_ARGS__))
#define VPD_WITH_TYPES(FUNCTION, PLAN, ...)                                                 \
    ((PLAN).taps == 16   ? VPD_WITH_ELEMENT(FUNCTION, TwoOutputs, PLAN, __VA_ARGS__)        \
     : (PLAN).taps == 36 ? VPD_WITH_ELEMENT(FUNCTION, FourOutputs, PLAN, __VA_ARGS__)       \
                         : VPD_WITH_ELEMENT(FUNCTION, TwoOfDoubled, PLAN, __VA_ARGS__))

}  // namespace

void winograd_conv2d_transform(const WinogradConv2dPlan& plan, int64_t block, int64_t first, int64_t last, float* rows,
                               float* scratch) {
    VPD_WITH_TYPES(transform, plan, block, first, last, rows, scratch);
}

void winograd_conv2d_multiply(const WinogradConv2dPlan& plan, int64_t block, int64_t first, int64_t last,
                              const float* rows, float* scratch) {
    VPD_WITH_TYPES(multiply_panels, plan, block, first, last, rows, scratch);
}

}  // namespace vpd::VPD_ISA
