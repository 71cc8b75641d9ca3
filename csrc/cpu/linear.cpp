// The rows of A of `linear`: two sources side by side, LayerNorm, scale and shift, smoothing, rounding.
#include <cmath>

#include "cpu/row_prologue.h"

namespace vpd::VPD_ISA {
namespace {

// Numbers are summed in several vectors, so that no addition waits for the one before.
VPD_INLINE float sum_of(f32x16 (&sums)[4]) { return reduce_sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))); }

// Mean and inverse deviation of numbers behind which there are zeros.
VPD_INLINE void set_norm(const float* numbers, int64_t size, float eps, Transform* t) {
    constexpr int64_t STEP = 4 * LANES;
    f32x16 sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)}, squares[4];
    int64_t i = 0;
    for (; i + STEP <= size; i += STEP)
        for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], load(numbers + i + j * LANES));
    for (; i < size; i += LANES) sums[0] = add(sums[0], load(numbers + i));
    t->mean = sum_of(sums) / static_cast<float>(size);
    const f32x16 mean = broadcast(t->mean);
    for (f32x16& square : squares) square = broadcast(0.0f);
    for (i = 0; i + STEP <= size; i += STEP)
        for (int j = 0; j < 4; ++j) {
            const f32x16 difference = subtract(load(numbers + i + j * LANES), mean);
            squares[j] = multiply_add(difference, difference, squares[j]);
        }
    for (; i + LANES <= size; i += LANES) {
        const f32x16 difference = subtract(load(numbers + i), mean);
        squares[0] = multiply_add(difference, difference, squares[0]);
    }
    float total = sum_of(squares);
    for (; i < size; ++i) total += (numbers[i] - t->mean) * (numbers[i] - t->mean);
    t->norm = true, t->inverse_deviation = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
}

// To: what the elements of A hold; 8 bits are made of float32.
template <typename To>
VPD_INLINE void make_row(const LinearPlan& plan, int64_t image, int64_t row, To* to, float* scratch, Range* range) {
    Transform t{nullptr, nullptr, false, plan.smoothing};
    if (plan.affine) t.scale = plan.affine + image * 2 * plan.k, t.shift = t.scale + plan.k;
    int64_t channel = 0;
    for (const Source& x : plan.x) {
        if (!x.data) continue;
        const int64_t offset = image * x.image + row * x.row;
        if (plan.norm)
            transform_piece(x, offset, x.channels, Transform{}, scratch + channel, nullptr);
        else
            transform_piece(x, offset, x.channels, t.from(channel), to + channel, range);
        channel += x.channels;
    }
    if (plan.norm) {
        store(scratch + channel, broadcast(0.0f));
        set_norm(scratch, channel, plan.eps, &t);
        transform_piece(scratch, channel, t, to, range);
    }
    store(to + channel, broadcast(0.0f));  // what is beyond the last number is read in whole elements
}

}  // namespace

void linear_rows(const LinearPlan& plan, int64_t first, int64_t count, float* a, float* scratch) {
    make_rows(plan, first, count, a, scratch,
              [&](int64_t image, int64_t row, auto* to, Range* range)
                  __attribute__((always_inline)) { make_row(plan, image, row, to, scratch, range); });
}

}  // namespace vpd::VPD_ISA
