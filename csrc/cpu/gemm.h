// out = activation(A B^T + bias) + residual, the GEMM of `linear` and `conv2d`, and what makes the rows of A in the cache:
// see vpd_fast/ops/linear.py and conv2d.py.
//
// B is a packed weight: panels of 32 columns, [panel][element][column], an element being 1 float32, 2 bfloat16 or 4
// 8-bit integers of the summed dimension. A row of A holds the same elements, and for 8 bits its scale and zero behind
// them: a number is scale * (u8 - zero).
#pragma once

#include <cstdint>

#include "isa.h"

namespace vpd {

constexpr int64_t PANEL = 32;           // columns of a packed weight that are neighbours in memory
constexpr int64_t MAX_BLOCK_ROWS = 96;  // rows that are multiplied with a panel before results are stored

enum class Precision { float32, bfloat16, int8 };  // of a weight, and of A while it is multiplied
enum class Activation { none, relu, silu, geglu };

// (images, rows, columns) or (images, height, width, channels); columns or channels are neighbours. In elements.
struct Source {
    const void* data;  // null: there is none
    bool bf16;         // otherwise float32
    int64_t channels;
    int64_t image, row, column;  // strides
};

struct GemmPlan {
    Source x[2];             // the channels of a row of A, or of an image, are those of both
    const float* affine;     // (images, 2, channels): x * affine[0] + affine[1], or null
    bool silu;               // then silu(x)
    const float* smoothing;  // (channels): then x * smoothing, or null

    Precision precision;
    const float* weight;                // (panels, elements, PANEL), 32 bits each
    const float *scales, *weight_sums;  // (n), for 8 bits: weight = data * scale, sums of data over k; otherwise null
    const float* bias;                  // (n), or null
    int64_t n, k;
    int64_t images, rows;   // rows of A of one image
    Activation activation;  // geglu: of a panel's 32 columns 16 are values, and then come their 16 gates
    Source residual;        // (images, rows, n_out), added last; n_out is n, or half of it for geglu
    void* out;              // likewise
    bool out_bf16;
    int64_t out_image, out_row;  // strides in elements

    int64_t elements, panels;  // of a row of A, of the weight
    int64_t row_floats;        // stride of the rows of A
};

struct LinearPlan : GemmPlan {
    bool norm;  // (x - mean) * rsqrt(variance + eps) over the row comes first
    float eps;
};

// Convolution of NHWC images: a row of A is what an output position reads (im2col), and exists only in the cache.
struct Conv2dPlan : GemmPlan {  // k = (dy * kernel_w + dx) * channels + channel
    int64_t height, width, out_width;
    int64_t kernel_h, kernel_w, stride, top, left;  // zeros above and beside the image, after the transform
};

}  // namespace vpd

// Make rows [first, first + count) of A, of all images. scratch: k + 32 floats, aligned to 64 bytes, of one thread.
VPD_DECLARE_PER_ISA(void linear_rows(const ::vpd::LinearPlan& plan, int64_t first, int64_t count, float* a,
                                     float* scratch);
                    void conv2d_rows(const ::vpd::Conv2dPlan& plan, int64_t first, int64_t count, float* a,
                                     float* scratch))

// Multiplies rows [first, first + count) of all images, which lie in `a`, with panels [first_panel, last_panel).
VPD_DECLARE_PER_ISA(void gemm_panels(const ::vpd::GemmPlan& plan, const float* a, int64_t first, int64_t count,
                                     int64_t first_panel, int64_t last_panel))
