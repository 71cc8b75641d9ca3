// The rows of A of `conv2d` (im2col): the inputs that an output position reads, transformed and rounded.
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
    const int64_t position = first % plan.rows, out_height = plan.rows / plan.out_width;
    int64_t y = position / plan.out_width, x = position % plan.out_width;
    make_rows(plan, first, count, a, scratch,
              [&](int64_t image, int64_t, auto* to, Range* range) __attribute__((always_inline)) {
                  make_row(plan, image, y, x, to, range);
                  if (++x < plan.out_width) return;
                  x = 0, y = y + 1 == out_height ? 0 : y + 1;
              });
}

}  // namespace vpd::VPD_ISA
