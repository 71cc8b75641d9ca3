// The rows of A for `linear`: two sources side by side, LayerNorm, an affine map, smoothing, rounding.
#include "cpu/linear.h"

#include <cmath>

#include "cpu/row_prologue.h"

namespace vpd::VPD_ISA {
namespace {

// Numbers that are summed in several vectors, so that no addition waits for the one before.
VPD_INLINE float mean_of(const float* numbers, int64_t size) {
    F16 sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    for (int64_t i = 0; i < size; i += LANES) sums[i / LANES % 4] = add(sums[i / LANES % 4], load(numbers + i));
    return reduce_sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / static_cast<float>(size);
}

// Numbers -> (number - mean) * rsqrt(variance + eps), in place. Beyond the last there are zeros, and they stay.
VPD_INLINE void normalize(float* numbers, int64_t size, float eps) {
    const F16 mean = broadcast(mean_of(numbers, size));
    F16 sum = broadcast(0.0f), other = sum;
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        const F16 a = subtract(load(numbers + i), mean), b = subtract(load(numbers + i + LANES), mean);
        sum = multiply_add(a, a, sum), other = multiply_add(b, b, other);
        store(numbers + i, a), store(numbers + i + LANES, b);
    }
    for (; i < size; i += LANES) {
        F16 a = subtract(load(numbers + i), mean);
        if (size - i < LANES) {
            float lanes[LANES];
            store(lanes, a);
            a = load_part(lanes, size - i);
        }
        sum = multiply_add(a, a, sum);
        store(numbers + i, a);
    }
    const float variance = reduce_sum(add(sum, other)) / static_cast<float>(size);
    const F16 factor = broadcast(1.0f / std::sqrt(variance + eps));
    for (i = 0; i < size; i += LANES) store(numbers + i, VPD_ISA::multiply(load(numbers + i), factor));
}

// To: what the elements of A hold; 8 bits are made of float32.
template <typename To>
VPD_INLINE void make_row(const LinearPlan& plan, int64_t image, int64_t row, To* to, float* scratch, Range* range) {
    Transform t{nullptr, nullptr, false, plan.factor};
    if (plan.affine) t.scale = plan.affine + image * 2 * plan.gemm.k, t.shift = t.scale + plan.gemm.k;
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
    store(to + channel, broadcast(0.0f));  // what is beyond the last number is read in whole elements
    if (!plan.norm) return;
    store(scratch + channel, broadcast(0.0f));
    normalize(scratch, plan.gemm.k, plan.eps);
    transform_piece(scratch, plan.gemm.k, t, to, range);
}

}  // namespace

void linear_rows(const LinearPlan& plan, int64_t first, int64_t count, float* a, float* scratch) {
    const int64_t row_floats = plan.gemm.row_floats;
    int64_t image = first / plan.gemm.rows, row = first % plan.gemm.rows;
    for (int64_t r = 0; r < count; ++r, a += row_floats) {
        if (plan.gemm.precision == Precision::float32) {
            make_row(plan, image, row, a, scratch, nullptr);
        } else if (plan.gemm.precision == Precision::bfloat16) {
            make_row(plan, image, row, reinterpret_cast<uint16_t*>(a), scratch, nullptr);
        } else {
            Range range;
            make_row(plan, image, row, scratch, scratch, &range);
            quantize_row(scratch, plan.gemm.k, range, a);
        }
        if (++row == plan.gemm.rows) row = 0, ++image;
    }
}

}  // namespace vpd::VPD_ISA
