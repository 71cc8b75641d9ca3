// Rows of A, in the cache, times panels of a packed weight; the epilogue takes the sums while they are in the first level.
#include "cpu/gemm.h"

#include "cpu/elementwise.h"
#include "cpu/matrix_tile.h"

namespace vpd::VPD_ISA {
namespace {

constexpr int64_t ELEMENTS_OF_CHUNK = 1024;  // of the summed dimension: this much of a panel stays in the second level

// sum - zero * total, of int32 lanes.
VPD_INLINE F16 subtract_multiple(F16 sum, int32_t zero, const int32_t* total) {
#if defined(__AVX512F__)
    const __m512i product = _mm512_mullo_epi32(_mm512_set1_epi32(zero), _mm512_loadu_si512(total));
    return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(sum), product));
#else
    int32_t lanes[LANES];
    __builtin_memcpy(lanes, &sum, sizeof lanes);
    for (int i = 0; i < LANES; ++i) lanes[i] -= zero * total[i];
    __builtin_memcpy(&sum, lanes, sizeof lanes);
    return sum;
#endif
}

// What the epilogue needs of a panel; zero beyond the last column.
struct Columns {
    float bias[PANEL], scales[PANEL];
    int32_t sums[PANEL];

    static Columns of(const GemmPlan& plan, int64_t panel) {
        Columns c = {};
        const int64_t first = panel * PANEL, count = plan.n - first < PANEL ? plan.n - first : PANEL;
        for (int64_t i = 0; i < count; ++i) {
            if (plan.bias) c.bias[i] = plan.bias[first + i];
            if (plan.scales) c.scales[i] = plan.scales[first + i];
            if (plan.sums) c.sums[i] = static_cast<int32_t>(plan.sums[first + i]);
        }
        return c;
    }
};

VPD_INLINE F16 load_residual(const Source& residual, int64_t at, int64_t count) {
    if (residual.bf16) {
        const auto* p = static_cast<const uint16_t*>(residual.data) + at;
        return count < LANES ? load_part(p, count) : load(p);
    }
    const auto* p = static_cast<const float*>(residual.data) + at;
    return count < LANES ? load_part(p, count) : load(p);
}

// The rows of one block and one panel: from their sums to what is stored.
template <typename E, typename T>
class Epilogue {
public:
    Epilogue(const GemmPlan& plan, int64_t panel)
        : plan_(plan), columns_(Columns::of(plan, panel)), geglu_(plan.activation == Activation::geglu) {
        const int64_t width = geglu_ ? LANES : PANEL, n = geglu_ ? plan.n / 2 : plan.n;
        first_ = panel * width;
        count_ = n - first_ < width ? n - first_ : width;
    }

    // a: the row's elements, of which 8 bits need scale and zero. row: of all images.
    __attribute__((always_inline)) void run(const float* sums, const float* a, int64_t image, int64_t row) const {
        F16 low, high;
        finish_sums(sums, a, &low, &high);
        if (geglu_) {
            if (count_ < LANES) {  // the gates follow directly upon the values
                float both[PANEL];
                store(both, low), store(both + LANES, high);
                high = load(both + count_);
            }
            return store_columns(VPD_ISA::multiply(low, gelu(high)), image, row, 0, count_);
        }
        if (plan_.activation == Activation::relu) {
            low = max(broadcast(0.0f), low), high = max(broadcast(0.0f), high);  // NaN stays
        } else if (plan_.activation == Activation::silu) {
            low = silu(low), high = silu(high);
        }
        store_columns(low, image, row, 0, count_);
        if (count_ > LANES) store_columns(high, image, row, LANES, count_ - LANES);
    }

private:
    __attribute__((always_inline)) void finish_sums(const float* sums, const float* a, F16* low, F16* high) const {
        *low = load(sums), *high = load(sums + LANES);
        const F16 low_bias = load(columns_.bias), high_bias = load(columns_.bias + LANES);
        if constexpr (E::WIDTH == 4) {
            const F16 scale = broadcast(a[0]);
            int32_t zero;
            __builtin_memcpy(&zero, a + 1, sizeof zero);
            *low = from_int32(subtract_multiple(*low, zero, columns_.sums));
            *high = from_int32(subtract_multiple(*high, zero, columns_.sums + LANES));
            *low = multiply_add(*low, VPD_ISA::multiply(scale, load(columns_.scales)), low_bias);
            *high = multiply_add(*high, VPD_ISA::multiply(scale, load(columns_.scales + LANES)), high_bias);
        } else {
            *low = add(*low, low_bias), *high = add(*high, high_bias);
        }
    }

    __attribute__((always_inline)) void store_columns(F16 x, int64_t image, int64_t row, int64_t column, int64_t count) const {
        column += first_;
        if (plan_.residual.data) {
            const int64_t at = image * plan_.residual.image + row * plan_.residual.row + column;
            x = add(x, load_residual(plan_.residual, at, count));
        }
        T* to = static_cast<T*>(plan_.out) + image * plan_.out_image + row * plan_.out_row + column;
        count < LANES ? store_part(to, x, count) : store(to, x);
    }

    const GemmPlan& plan_;
    const Columns columns_;
    const bool geglu_;
    int64_t first_, count_;  // columns of the result
};

template <typename E, typename T>
void multiply_panels(const GemmPlan& plan, const float* a, int64_t first, int64_t count, int64_t first_panel,
                     int64_t last_panel) {
    const int64_t size = plan.elements, row_floats = plan.row_floats;
    const int64_t blocks = (count + MOST_ROWS_OF_BLOCK - 1) / MOST_ROWS_OF_BLOCK;
    const int64_t chunks = (size + ELEMENTS_OF_CHUNK - 1) / ELEMENTS_OF_CHUNK;
    float sums[MOST_ROWS_OF_BLOCK * PANEL];
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const float* b = plan.weight + panel * size * PANEL;
        const Epilogue<E, T> epilogue(plan, panel);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t begin = count * block / blocks, end = count * (block + 1) / blocks;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t i = size * chunk / chunks, next = size * (chunk + 1) / chunks;
                const Factors rows{a + begin * row_floats + i, row_floats, 1};
                multiply<E>(end - begin, rows, b + i * PANEL, next - i, sums, PANEL, chunk > 0);
            }
            int64_t image = (first + begin) / plan.rows, row = (first + begin) % plan.rows;
            for (int64_t r = begin; r < end; ++r) {
                epilogue.run(sums + (r - begin) * PANEL, a + r * row_floats + size, image, row);
                if (++row == plan.rows) row = 0, ++image;
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
        case Precision::float32: return multiply_panels_to<Single>(plan, a, first, count, first_panel, last_panel);
        case Precision::bfloat16: return multiply_panels_to<Pair>(plan, a, first, count, first_panel, last_panel);
        case Precision::int8: return multiply_panels_to<Quad>(plan, a, first, count, first_panel, last_panel);
    }
}

}  // namespace vpd::VPD_ISA
