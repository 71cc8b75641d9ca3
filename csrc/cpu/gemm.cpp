// GEMM of rows of A, in the cache, with panels of a packed weight; the epilogue runs while sums are in the first level.
#include "cpu/gemm.h"

#include "cpu/row_prologue.h"

namespace vpd::VPD_ISA {
namespace {

constexpr int64_t CHUNK_ELEMENTS = 1024;  // of the summed dimension: this much of a panel stays in the second level

// sum - zero * weight_sum, of int32 lanes.
VPD_INLINE f32x16 subtract_zero_point(f32x16 sum, int32_t zero, const int32_t* weight_sums) {
#if defined(__AVX512F__)
    const __m512i product = _mm512_mullo_epi32(_mm512_set1_epi32(zero), _mm512_loadu_si512(weight_sums));
    return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(sum), product));
#else
    int32_t lanes[LANES];
    __builtin_memcpy(lanes, &sum, sizeof lanes);
    for (int i = 0; i < LANES; ++i) lanes[i] -= zero * weight_sums[i];
    __builtin_memcpy(&sum, lanes, sizeof lanes);
    return sum;
#endif
}

// Parameters of a panel's epilogue; zero beyond the last column.
struct PanelParameters {
    alignas(64) float bias[PANEL], scales[PANEL];
    int32_t weight_sums[PANEL];

    static PanelParameters of(const GemmPlan& plan, int64_t panel) {
        PanelParameters c = {};
        const int64_t first = panel * PANEL, count = plan.n - first < PANEL ? plan.n - first : PANEL;
        for (int64_t i = 0; i < count; ++i) {
            if (plan.bias) c.bias[i] = plan.bias[first + i];
            if (plan.scales) c.scales[i] = plan.scales[first + i];
            if (plan.weight_sums) c.weight_sums[i] = static_cast<int32_t>(plan.weight_sums[first + i]);
        }
        return c;
    }
};

// A block of sums, [row][PANEL], whose results are stored in consecutive rows of one image.
template <typename T>
struct Block {
    const float *sums, *scale_and_zero;  // the latter for 8 bits only; both of the first row
    int64_t row_floats;                  // from one row's to the next
    T* out;
    int64_t out_row;
    const void* residual;
    bool residual_bf16;
    int64_t residual_row;
    int64_t rows, columns;  // columns of the result
};

template <typename T>
VPD_INLINE void store_columns(f32x16 x, const Block<T>& block, int64_t row, int64_t column, int64_t count) {
    if (block.residual) {
        const int64_t at = row * block.residual_row + column;
        x = add(x, block.residual_bf16 ? load_some(static_cast<const uint16_t*>(block.residual) + at, count)
                                       : load_some(static_cast<const float*>(block.residual) + at, count));
    }
    T* to = block.out + row * block.out_row + column;
    count < LANES ? store_part(to, x, count) : store(to, x);
}

// FULL: the panel has all its columns.
template <typename E, typename T, Activation ACTIVATION, bool FULL>
void block_epilogue(const PanelParameters& panel, const Block<T> block) {
    constexpr int64_t WIDTH = ACTIVATION == Activation::geglu ? LANES : PANEL;
    const int64_t count = FULL ? WIDTH : block.columns;
    const f32x16 low_bias = load(panel.bias), high_bias = load(panel.bias + LANES);
    const f32x16 low_scale = load(panel.scales), high_scale = load(panel.scales + LANES);
    const float* scale_and_zero = block.scale_and_zero;
    for (int64_t r = 0; r < block.rows; ++r, scale_and_zero += block.row_floats) {
        f32x16 low = load(block.sums + r * PANEL), high = load(block.sums + r * PANEL + LANES);
        if constexpr (E::WIDTH == 4) {
            const f32x16 scale = broadcast(scale_and_zero[0]);
            int32_t zero;
            __builtin_memcpy(&zero, scale_and_zero + 1, sizeof zero);
            low = from_int32(subtract_zero_point(low, zero, panel.weight_sums));
            high = from_int32(subtract_zero_point(high, zero, panel.weight_sums + LANES));
            low = multiply_add(low, VPD_ISA::multiply(scale, low_scale), low_bias);
            high = multiply_add(high, VPD_ISA::multiply(scale, high_scale), high_bias);
        } else {
            low = add(low, low_bias), high = add(high, high_bias);
        }
        if constexpr (ACTIVATION == Activation::geglu) {
            if (!FULL) {  // the gates follow directly upon the values
                float both[PANEL];
                store(both, low), store(both + LANES, high);
                high = load(both + count);
            }
            store_columns(VPD_ISA::multiply(low, gelu(high)), block, r, 0, count);
            continue;
        }
        if constexpr (ACTIVATION == Activation::relu) {
            low = max(broadcast(0.0f), low), high = max(broadcast(0.0f), high);  // NaN stays
        } else if constexpr (ACTIVATION == Activation::silu) {
            low = silu(low), high = silu(high);
        }
        store_columns(low, block, r, 0, count);
        if (FULL || count > LANES) store_columns(high, block, r, LANES, count - LANES);
    }
}

template <typename E, typename T, Activation ACTIVATION>
VPD_INLINE void block_epilogue(const PanelParameters& panel, const Block<T>& block) {
    block.columns == (ACTIVATION == Activation::geglu ? LANES : PANEL)
        ? block_epilogue<E, T, ACTIVATION, true>(panel, block)
        : block_epilogue<E, T, ACTIVATION, false>(panel, block);
}

template <typename E, typename T>
VPD_INLINE void block_epilogue(Activation activation, const PanelParameters& panel, const Block<T>& block) {
    switch (activation) {
        case Activation::none: return block_epilogue<E, T, Activation::none>(panel, block);
        case Activation::relu: return block_epilogue<E, T, Activation::relu>(panel, block);
        case Activation::silu: return block_epilogue<E, T, Activation::silu>(panel, block);
        case Activation::geglu: return block_epilogue<E, T, Activation::geglu>(panel, block);
    }
}

// Epilogue of one panel: bias, activation, residual and the store of the results.
template <typename E, typename T>
class PanelEpilogue {
public:
    PanelEpilogue(const GemmPlan& plan, int64_t panel)
        : plan_(plan), parameters_(PanelParameters::of(plan, panel)), geglu_(plan.activation == Activation::geglu) {
        const int64_t width = geglu_ ? LANES : PANEL, n = geglu_ ? plan.n / 2 : plan.n;
        column_ = panel * width;
        count_ = n - column_ < width ? n - column_ : width;
    }

    // Fetches what `apply` will add, while the sums are computed.
    void prefetch(int64_t row, int64_t count) const {
        each_image(row, count, [](const Block<T>& block) {
            for (int64_t r = 0; r < block.rows; ++r) __builtin_prefetch(block.out + r * block.out_row, 1);
            if (!block.residual) return;
            const int64_t bytes = block.residual_bf16 ? 2 : 4;
            const char* residual = static_cast<const char*>(block.residual);
            for (int64_t r = 0; r < block.rows; ++r, residual += block.residual_row * bytes) {
                __builtin_prefetch(residual);
                __builtin_prefetch(residual + (block.columns - 1) * bytes);
            }
        });
    }

    // sums: [row][PANEL]; a: the first row's elements; row, counted through all images, and `count`: which they are.
    void apply(const float* sums, const float* a, int64_t row, int64_t count) const {
        each_image(row, count, [&](Block<T> block) {
            block.sums = sums, block.scale_and_zero = a + plan_.elements;
            block_epilogue<E, T>(plan_.activation, parameters_, block);
            sums += block.rows * PANEL, a += block.rows * plan_.row_floats;
        });
    }

private:
    template <typename Function>
    __attribute__((always_inline)) void each_image(int64_t row, int64_t count, Function function) const {
        const Source& residual = plan_.residual;
        while (count > 0) {
            const int64_t image = row / plan_.rows, position = row % plan_.rows;
            const int64_t left = plan_.rows - position, rows = left < count ? left : count;
            const int64_t from = image * residual.image + position * residual.row + column_;
            const void* addend = nullptr;
            if (residual.data) addend = static_cast<const char*>(residual.data) + from * (residual.bf16 ? 2 : 4);
            T* out = static_cast<T*>(plan_.out) + image * plan_.out_image + position * plan_.out_row + column_;
            function(Block<T>{nullptr, nullptr, plan_.row_floats, out, plan_.out_row, addend, residual.bf16,
                              residual.row, rows, count_});
            row += rows, count -= rows;
        }
    }

    const GemmPlan& plan_;
    const PanelParameters parameters_;
    const bool geglu_;
    int64_t column_, count_;  // of the result
};

// Multiplies at most MAX_ROWS rows. Arguments are in registers: in memory they would wait for the stores before them.
template <typename E>
__attribute__((noinline)) void multiply_tile(int64_t rows, const float* a, int64_t row_floats, const float* b,
                                             int64_t size, float* sums, bool add) {
    for (int64_t column = 0; column < PANEL; column += COLUMNS * LANES)
        multiply_rows<E, COLUMNS>(rows, {a, row_floats, 1}, b + column, size, sums + column, PANEL, add);
}

template <typename E, typename T>
void multiply_panels(const GemmPlan& plan, const float* a, int64_t first, int64_t count, int64_t first_panel,
                     int64_t last_panel) {
    const int64_t size = plan.elements, row_floats = plan.row_floats;
    const int64_t blocks = ceil_divide(count, MAX_BLOCK_ROWS);
    const int64_t chunks = ceil_divide(size, CHUNK_ELEMENTS);
    alignas(64) float sums[MAX_BLOCK_ROWS * PANEL];
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const float* b = plan.weight + panel * size * PANEL;
        const PanelEpilogue<E, T> epilogue(plan, panel);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t begin = count * block / blocks, rows = count * (block + 1) / blocks - begin;
            const int64_t tiles = ceil_divide(rows, MAX_ROWS), max_rows = ceil_divide(rows, tiles);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t i = size * chunk / chunks, next = size * (chunk + 1) / chunks;
                for (int64_t r = 0; r < rows; r += max_rows) {
                    const int64_t height = rows - r < max_rows ? rows - r : max_rows;
                    const float* from = a + (begin + r) * row_floats;
                    if (chunk + 1 == chunks) epilogue.prefetch(first + begin + r, height);
                    multiply_tile<E>(height, from + i, row_floats, b + i * PANEL, next - i, sums + r * PANEL,
                                     chunk > 0);
                    if (chunk + 1 == chunks) epilogue.apply(sums + r * PANEL, from, first + begin + r, height);
                }
            }
        }
    }
}

template <typename E>
void multiply_panels_to(const GemmPlan& plan, const float* a, int64_t first, int64_t count, int64_t first_panel,
                        int64_t last_panel) {
    plan.out_bf16 ? multiply_panels<E, uint16_t>(plan, a, first, count, first_panel, last_panel)
                  : multiply_panels<E, float>(plan, a, first, count, first_panel, last_panel);
}

}  // namespace

void gemm_panels(const GemmPlan& plan, const float* a, int64_t first, int64_t count, int64_t first_panel,
                 int64_t last_panel) {
    switch (plan.precision) {
        case Precision::float32: return multiply_panels_to<F32>(plan, a, first, count, first_panel, last_panel);
        case Precision::bfloat16: return multiply_panels_to<Bf16x2>(plan, a, first, count, first_panel, last_panel);
        case Precision::int8: return multiply_panels_to<Int8x4>(plan, a, first, count, first_panel, last_panel);
    }
}

}  // namespace vpd::VPD_ISA
