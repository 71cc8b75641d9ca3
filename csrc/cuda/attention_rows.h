// Rows of attention's heads, as TMA reads and writes them.
#pragma once

#include <cstdint>

#include "cuda/tensor_map.h"

namespace vpd {

// Rows (image, row) of heads * head_dim elements next to each other; strides in elements, an image's 0 where all share
// one.
struct CudaRows {
    void* data;
    int64_t image, row;
};

namespace attention {

constexpr int LINE_CHANNELS = 64;  // of 16 bits, of a box

// Returns why TMA cannot read these rows, or nullptr.
inline const char* rows_refuse(const CudaRows& x, int64_t images, int64_t rows) {
    constexpr int64_t MAX_STRIDE_BYTES = int64_t(1) << 40;
    if (reinterpret_cast<uintptr_t>(x.data) % 16) return "an address is not a multiple of 16 bytes";
    const int64_t sizes[] = {x.image ? images : 1, rows}, strides[] = {x.image, x.row};
    for (int axis = 0; axis < 2; ++axis) {
        if (sizes[axis] == 1) continue;
        if (strides[axis] % 8) return "a stride of q, k or v is not a multiple of 8 elements";
        if (strides[axis] < 1 || strides[axis] * 2 >= MAX_STRIDE_BYTES)
            return "rows that share memory, or lie too far apart, cannot be read by TMA";
    }
    return nullptr;
}

// Boxes of 64 channels of one head and `box_rows` rows.
inline bool encode_rows(CUtensorMap& map, int64_t heads, int64_t head_dim, const CudaRows& x, int64_t images,
                        int64_t rows, int box_rows) {
    const cuuint64_t width = cuuint64_t(heads * head_dim) * 2;  // for strides of what there is only one
    const cuuint64_t sizes[] = {cuuint64_t(head_dim), cuuint64_t(heads), cuuint64_t(rows), cuuint64_t(images)};
    const cuuint64_t strides[] = {cuuint64_t(head_dim) * 2, rows > 1 ? cuuint64_t(x.row) * 2 : width,
                                  images > 1 ? cuuint64_t(x.image) * 2 : width};
    const cuuint32_t box[] = {LINE_CHANNELS, 1, cuuint32_t(box_rows), 1}, steps[] = {1, 1, 1, 1};
    return encode_tensor_map(map, 2, 4, x.data, sizes, strides, box, steps);
}

}  // namespace attention
}  // namespace vpd
