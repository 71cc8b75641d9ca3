// Winograd convolution, second and third step: rows of elements times the weight, and from products to pixels.
#include "cpu/winograd_conv2d.h"

#include "cpu/matrix_tile.h"
#include "cpu/row_prologue.h"
#include "cpu/winograd_tile.h"

namespace vpd::VPD_ISA {
namespace {

// Epilogue of 8-bit products of one matrix: converts their int32 sums to float32.
struct Dequantize {
    const float *zeros, *scales;  // per column: the zero point's part of the sum, the weight's scale
    const float* row_scales;

    __attribute__((always_inline)) f32x16 apply(f32x16 sum, int64_t row, int64_t column) const {
        const f32x16 whole = subtract(from_int32(sum), load(zeros + column));
        return VPD_ISA::multiply(VPD_ISA::multiply(whole, load(scales + column)), broadcast(row_scales[row]));
    }
};

template <typename W, typename E>
class Multiplier {
public:
    Multiplier(const WinogradConv2dPlan& plan, int64_t block, const float* rows, float* scratch)
        : plan_(plan), rows_(rows), products_(scratch + plan.products_offset) {
        const WinogradBlock b = winograd_block(plan, block);
        for (int64_t row = b.first_row; row < b.last_row; ++row)
            for (int64_t column = b.first_column; column < b.last_column; ++column)
                tiles_[count_++] = place_of(row, column);
        parts_ = ceil_divide(count_, MAX_ROWS);
        for (int64_t part = 0; part <= parts_; ++part) starts_[part] = count_ * part / parts_;
    }

    void run(int64_t panel) {
        first_ = panel * PANEL;
        load_bias();
        const int64_t steps = plan_.matrices * parts_;
        int64_t step = 0, foreseen = 0;
        for (int64_t matrix = 0; matrix < plan_.matrices; ++matrix) {
            if (E::WIDTH == 4) load_scales(matrix);
            for (int64_t part = 0; part < parts_; ++part) {
                for (++step; foreseen * steps < step * count_ * W::OUT; ++foreseen) prefetch_pixels(foreseen);
                multiply_tiles(panel, matrix, starts_[part], starts_[part + 1]);
            }
        }
        for (int64_t tile = 0; tile < count_; ++tile)
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

    int64_t columns_of_panel() const { return smaller(PANEL, plan_.n - first_); }

    void load_bias() {
        const float* bias = plan_.bias;
        for (int64_t i = 0; i < PANEL; ++i) bias_[i] = bias && i < columns_of_panel() ? bias[first_ + i] : 0.0f;
    }

    void load_scales(int64_t matrix) {
        const int64_t at = matrix * plan_.n + first_;
        for (int64_t i = 0; i < columns_of_panel(); ++i) {
            scales_[i] = plan_.scales[at + i];
            zeros_[i] = 128.0f * plan_.weight_sums[at + i];
        }
    }

    void multiply_tiles(int64_t panel, int64_t matrix, int64_t first, int64_t last) {
        const int64_t size = plan_.elements;
        const float* weight = plan_.weight + (matrix * plan_.panels + panel) * size * PANEL;
        const LeftOperand rows{rows_ + matrix * plan_.matrix_stride + first * plan_.row, plan_.row, 1};
        float* products = products_ + matrix * plan_.product_stride + first * PANEL;
        if constexpr (E::WIDTH == 4) {
            const float* row_scales = rows_ + plan_.scales_offset + matrix * MAX_TILES + first;
            const Dequantize epilogue{zeros_, scales_, row_scales};
            multiply<E>(last - first, rows, weight, size, products, PANEL, false, epilogue);
        } else {
            multiply<E>(last - first, rows, weight, size, products, PANEL);
        }
    }

    // Memory that store_tile will touch, row by row of the tiles' pixels: short pieces that are far apart, which the
    // hardware does not foresee. Inline, because GCC drops calls of functions that do nothing else.
    __attribute__((always_inline)) void prefetch_pixels(int64_t pixel_row) const {
        const Tile& tile = tiles_[pixel_row / W::OUT];
        const int64_t i = pixel_row % W::OUT;
        if (i >= tile.rows) return;
        const Source& r = plan_.residual;
        const int64_t out_size = plan_.out_bf16 ? 2 : 4, residual_size = r.bf16 ? 2 : 4;
        const char* out = static_cast<const char*>(plan_.out) + (tile.out + i * plan_.out_row + first_) * out_size;
        for (int64_t j = 0; j < tile.columns; ++j)
            for (int64_t at = 0; at < PANEL * out_size; at += 64)
                __builtin_prefetch(out + j * plan_.out_column * out_size + at, 1, 2);
        if (!r.data) return;
        const char* residual = static_cast<const char*>(r.data) + (tile.residual + i * r.row + first_) * residual_size;
        for (int64_t j = 0; j < tile.columns; ++j)
            for (int64_t at = 0; at < PANEL * residual_size; at += 64)
                __builtin_prefetch(residual + j * r.column * residual_size + at, 0, 2);
    }

    void store_tile(int64_t number, int64_t column) const {
        const float* from = products_ + number * PANEL + column;
        const int64_t stride = plan_.product_stride;
        f32x16 half[W::OUT][W::POINTS], y[W::OUT][W::OUT];
#pragma GCC unroll 6
        for (int j = 0; j < W::POINTS; ++j) {
            f32x16 m[W::POINTS], column_of[W::OUT];
#pragma GCC unroll 6
            for (int i = 0; i < W::POINTS; ++i) m[i] = load(from + (i * W::POINTS + j) * stride);
            if (j == 1) m[1] = add(m[1], load(bias_ + column));  // this one is in every pixel, with factor 1
            W::output(m, column_of);
#pragma GCC unroll 4
            for (int i = 0; i < W::OUT; ++i) half[i][j] = column_of[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < W::OUT; ++i) W::output(half[i], y[i]);
        if (plan_.activation == Activation::relu)
            each_pixel(y, [](f32x16 a) { return max(broadcast(0.0f), a); });  // NaN stays
        else if (plan_.activation == Activation::silu)
            each_pixel(y, [](f32x16 a) { return silu(a); });
        const Tile& tile = tiles_[number];
        const int64_t channel = first_ + column, count = plan_.n - channel;
        const bool whole = tile.rows == W::OUT && tile.columns == W::OUT && count >= LANES;
        whole ? store_pixels<true>(tile, channel, count, y) : store_pixels<false>(tile, channel, count, y);
    }

    using Pixels = f32x16[W::OUT][W::OUT];

    template <typename Function>
    static __attribute__((always_inline)) void each_pixel(Pixels& y, Function function) {
#pragma GCC unroll 4
        for (int i = 0; i < W::OUT; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < W::OUT; ++j) y[i][j] = function(y[i][j]);
    }

    // WHOLE: all pixels are inside of the image, and all 16 channels exist; count: those from the first on.
    template <bool WHOLE>
    __attribute__((always_inline)) void store_pixels(const Tile& tile, int64_t channel, int64_t count,
                                                     Pixels& y) const {
        const Source& r = plan_.residual;
        if (r.data) {
            const int64_t at = tile.residual + channel;
            r.bf16 ? add_pixels<WHOLE>(static_cast<const uint16_t*>(r.data) + at, r.row, r.column, tile, count, y)
                   : add_pixels<WHOLE>(static_cast<const float*>(r.data) + at, r.row, r.column, tile, count, y);
        }
        const int64_t at = tile.out + channel;
        plan_.out_bf16 ? store_as<WHOLE>(static_cast<uint16_t*>(plan_.out) + at, tile, count, y)
                       : store_as<WHOLE>(static_cast<float*>(plan_.out) + at, tile, count, y);
    }

    template <bool WHOLE, typename T>
    static __attribute__((always_inline)) void add_pixels(const T* from, int64_t row, int64_t column, const Tile& tile,
                                                          int64_t count, Pixels& y) {
#pragma GCC unroll 4
        for (int i = 0; i < W::OUT; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < W::OUT; ++j)
                if (WHOLE)
                    y[i][j] = add(y[i][j], load(from + i * row + j * column));
                else if (i < tile.rows && j < tile.columns)
                    y[i][j] = add(y[i][j], load_some(from + i * row + j * column, count));
    }

    template <bool WHOLE, typename T>
    __attribute__((always_inline)) void store_as(T* to, const Tile& tile, int64_t count, const Pixels& y) const {
#pragma GCC unroll 4
        for (int i = 0; i < W::OUT; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < W::OUT; ++j) {
                T* pixel = to + i * plan_.out_row + j * plan_.out_column;
                if (WHOLE || (i < tile.rows && j < tile.columns && count >= LANES))
                    store(pixel, y[i][j]);
                else if (i < tile.rows && j < tile.columns)
                    store_part(pixel, y[i][j], count);
            }
    }

    const WinogradConv2dPlan& plan_;
    const float* const rows_;
    float* const products_;
    int64_t count_ = 0, first_ = 0;                     // tiles; the panel's first column
    int64_t parts_, starts_[MAX_TILES / MAX_ROWS + 2];  // of tiles that the micro-kernel takes at once
    Tile tiles_[MAX_TILES];
    float bias_[PANEL], scales_[PANEL] = {}, zeros_[PANEL] = {};  // of the panel's columns; the latter of one matrix
};

}  // namespace

void winograd_conv2d_multiply(const WinogradConv2dPlan& plan, int64_t block, int64_t first, int64_t last,
                              const float* rows, float* scratch) {
    with_types(plan, [&](auto transform, auto element) {
        Multiplier<decltype(transform), decltype(element)> multiplier(plan, block, rows, scratch);
        for (int64_t panel = first; panel < last; ++panel) multiplier.run(panel);
    });
}

}  // namespace vpd::VPD_ISA
