// The rows of A of `conv2d` (im2col): the inputs that an output position reads, transformed and rounded.
#include "cpu/conv2d.h"

#include "cpu/row_prologue.h"

namespace vpd::VPD_ISA {
namespace {

// To: what the elements of A hold; 8 bits are made of float32.
template <typename To>
VPD_INLINE void make_row(const Conv2dPlan& plan, int64_t image, int64_t y, int64_t x, To* to, Range* range) {
    const int64_t channels = plan.x[0].channels + plan.x[1].channels;
    Transform t{nullptr, nullptr, plan.silu, plan.smoothing};
    if (plan.affine) t.scale = plan.affine + image * 2 * channels, t.shift = t.scale + channels;
    // Inputs of one kernel row are neighbours in memory.
    const bool dense = t.nothing() && !plan.x[1].data && plan.x[0].column == channels;
    const int64_t from_x = x * plan.stride - plan.left, from_y = y * plan.stride - plan.top;
    const int64_t skipped = from_x < 0 ? -from_x : 0;  // kernel columns before the image
    const int64_t end = plan.width - from_x < plan.kernel_w ? plan.width - from_x : plan.kernel_w;
    for (int64_t dy = 0; dy < plan.kernel_h; ++dy) {
        const int64_t row = from_y + dy;
        if (row < 0 || row >= plan.height || skipped >= end) {
            clear_piece(to, plan.kernel_w * channels);
            to += plan.kernel_w * channels;
            continue;
        }
        if (skipped) clear_piece(to, skipped * channels);
        for (int64_t dx = skipped; dx < end; ++dx) {
            for (int64_t s = 0, channel = 0; s < 2; channel += plan.x[s++].channels) {
                const Source& source = plan.x[s];
                if (!source.data) continue;
                const int64_t offset = image * source.image + row * source.row + (from_x + dx) * source.column;
                const int64_t count = dense ? (end - dx) * channels : source.channels;
                transform_piece(source, offset, count, t.from(channel), to + dx * channels + channel, range);
            }
            if (dense) break;
        }
        if (end < plan.kernel_w) clear_piece(to + end * channels, (plan.kernel_w - end) * channels);
        to += plan.kernel_w * channels;
    }
    store(to, broadcast(0.0f));  // what is beyond the last number is read in whole elements
}

}  // namespace

void conv2d_rows(const Conv2dPlan& plan, int64_t first, int64_t count, float* a, float* scratch) {
    const int64_t row_floats = plan.gemm.row_floats;
    int64_t image = first / plan.gemm.rows;
    int64_t y = first % plan.gemm.rows / plan.out_width, x = first % plan.gemm.rows % plan.out_width;
    const int64_t out_height = plan.gemm.rows / plan.out_width;
    for (int64_t r = 0; r < count; ++r, a += row_floats) {
        if (plan.gemm.precision == Precision::float32) {
            make_row(plan, image, y, x, a, nullptr);
        } else if (plan.gemm.precision == Precision::bfloat16) {
            make_row(plan, image, y, x, reinterpret_cast<uint16_t*>(a), nullptr);
        } else {
            Range range;
            make_row(plan, image, y, x, scratch, &range);
            quantize_row(scratch, plan.gemm.k, range, a);
        }
        if (++x < plan.out_width) continue;
        x = 0;
        if (++y == out_height) y = 0, ++image;
    }
}

}  // namespace vpd::VPD_ISA
