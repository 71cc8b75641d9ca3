// Plans and launches of the prologue.
#include "cuda/prologue.cuh"

#include <initializer_list>
#include <utility>

#include "sizes.h"

namespace vpd {
namespace prologue {
namespace {

constexpr int64_t BYTES = 16;                // that channels are read at a time
constexpr int64_t BLOCKS_PER_PROCESSOR = 8;  // that are wanted at least, as far as there is work for them

int64_t bytes_of(CudaFloat dtype) { return dtype == CudaFloat::float32 ? 4 : 2; }

// The same without padding as one line, or as few lines as possible.
CudaPrologue merged(CudaPrologue p) {
    if (p.tall != p.height || p.wide != p.width) return p;
    const int sources = p.channels[1] ? 2 : 1;
    bool even = true;  // positions lie as far apart from line to line as within one
    for (int i = 0; i < sources; ++i) even = even && p.source[i].row == p.width * p.source[i].column;
    if (p.width != 1 && p.height != 1 && !even) return p;
    if (p.width == 1)
        for (CudaPositions& source : p.source) source.column = source.row;
    p.width = p.wide = p.height * p.width;
    p.height = p.tall = 1;
    return p;
}

PositionsPlan plan_of(const CudaPrologue& p) {
    PositionsPlan plan;
    plan.vectors = int((p.channels[0] + p.channels[1]) / CHANNELS);
    plan.tiles = int(ceil_divide(plan.vectors, MAX_THREADS));
    plan.tile = int(ceil_divide(plan.vectors, plan.tiles));
    plan.rows = MAX_THREADS / plan.tile;
    plan.threads = int(ceil_divide(plan.tile * plan.rows, WARP)) * WARP;
    // Whole lines if that is enough work for the device, else pieces of as many positions as fit one step or several.
    const int64_t lines = p.batch * p.tall, at_once = int64_t(plan.rows) * UNROLL,
                  pieces = ceil_divide(p.wide, at_once);
    const int64_t wanted = BLOCKS_PER_PROCESSOR * device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t of_line = ceil_divide(wanted, lines * plan.tiles);
    plan.chunk = int(ceil_divide(pieces, of_line < pieces ? of_line : pieces) * at_once);
    plan.chunks = int(ceil_divide(p.wide, plan.chunk));
    plan.blocks = lines * plan.tiles * plan.chunks;
    return plan;
}

RowsPlan rows_plan_of(const CudaPrologue& p) {
    RowsPlan plan;
    plan.vectors = int((p.channels[0] + p.channels[1]) / CHANNELS);
    plan.warps = int(ceil_divide(plan.vectors, WARP * UNROLL));
    plan.rows = plan.warps == 1 ? ROWS : 1;
    plan.threads = plan.rows * plan.warps * WARP;
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t wanted = ceil_divide(2 * BLOCKS_PER_PROCESSOR * processors, p.batch);
    const int64_t needed = ceil_divide(p.width, plan.rows);
    plan.blocks_of_image = needed < wanted ? needed : wanted;
    plan.blocks = plan.blocks_of_image * p.batch;
    return plan;
}

bool by_rows(const CudaPrologue& p, CudaRounding rounding) { return p.norm || rounding == CudaRounding::row; }

template <typename In, typename Out, bool RANGE>
cudaError_t launch_positions(const CudaPrologue& p, cudaStream_t stream) {
    const PositionsPlan plan = plan_of(p);
    const auto launch = [&](auto kernel) {
        const int shared = RANGE ? plan.threads / WARP * 3 * int(sizeof(float)) : 0;
        return launch_kernel(kernel, plan.blocks, plan.threads, shared, 1, stream, p, plan);
    };
    if (p.factors)
        return p.silu ? launch(positions_kernel<In, Out, true, true, RANGE>)
                      : launch(positions_kernel<In, Out, false, true, RANGE>);
    return p.silu ? launch(positions_kernel<In, Out, true, false, RANGE>)
                  : launch(positions_kernel<In, Out, false, false, RANGE>);
}

template <typename In, typename Out>
cudaError_t launch_of(const CudaPrologue& p, CudaRounding rounding, cudaStream_t stream) {
    if (!by_rows(p, rounding)) return launch_positions<In, Out, false>(p, stream);
    const RowsPlan plan = rows_plan_of(p);
    if (plan.warps == 1)
        return launch_kernel(rows_kernel<In, Out, true>, plan.blocks, plan.threads, 0, 1, stream, p, plan);
    const int shared = plan.warps * 3 * int(sizeof(float));
    return launch_kernel(rows_kernel<In, Out, false>, plan.blocks, plan.threads, shared, 1, stream, p, plan);
}

template <typename In>
cudaError_t launch_from(const CudaPrologue& p, CudaRounding rounding, cudaStream_t stream) {
    if (rounding == CudaRounding::range) return launch_positions<In, int8_t, true>(p, stream);
    switch (p.out_dtype) {
        case CudaOperand::int8: return launch_of<In, int8_t>(p, rounding, stream);
        case CudaOperand::float8_e4m3fn: return launch_of<In, Float8>(p, rounding, stream);
        case CudaOperand::bfloat16: return launch_of<In, Bfloat16>(p, rounding, stream);
        case CudaOperand::float16: return launch_of<In, Float16>(p, rounding, stream);
    }
    return cudaErrorInvalidValue;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % BYTES == 0; }

}  // namespace
}  // namespace prologue

const char* prologue_cuda_refuses(const CudaPrologue& problem, CudaRounding rounding) {
    using namespace prologue;
    const CudaPrologue p = merged(problem);
    const bool eight = p.out_dtype == CudaOperand::int8 || p.out_dtype == CudaOperand::float8_e4m3fn;
    for (int i = 0; i < 2; ++i) {
        const CudaPositions& source = p.source[i];
        if (p.channels[i] % CHANNELS) return "channels are not a multiple of 8";
        if (!p.channels[i]) continue;
        if (!aligned(source.data)) return "a source is not aligned to 16 bytes";
        for (const int64_t stride : {source.image, source.row, source.column})
            if (stride * bytes_of(p.dtype) % BYTES) return "strides of a source are not multiples of 16 bytes";
    }
    if (!aligned(p.out) || !aligned(p.scale_shift) || !aligned(p.factors))
        return "result, scales and shifts, or factors are not aligned to 16 bytes";
    if (p.out_dtype == CudaOperand::float8_e4m3fn && device_attribute(cudaDevAttrComputeCapabilityMajor) < 9)
        return "the device does not round to 8-bit floating point";
    if (rounding != CudaRounding::range && eight == (rounding == CudaRounding::plain))
        return "the rounding is not that of the result's type";
    if (by_rows(p, rounding)) {
        if (rounding != CudaRounding::row && rounding != CudaRounding::plain)
            return "rows are normalised, which is not done for whole images";
        if (p.tall != 1 || p.height != 1 || p.wide != p.width) return "rows of images with zeros around them";
        if (p.channels[0] + p.channels[1] > int64_t(MAX_WARPS) * WARP * UNROLL * CHANNELS) return "rows are too long";
    }
    return nullptr;
}

int64_t prologue_cuda_parts(const CudaPrologue& problem) {
    const CudaPrologue p = prologue::merged(problem);
    const prologue::PositionsPlan plan = prologue::plan_of(p);
    return p.tall * plan.tiles * plan.chunks;
}

cudaError_t prologue_cuda(const CudaPrologue& problem, CudaRounding rounding, cudaStream_t stream) {
    if (prologue_cuda_refuses(problem, rounding)) return cudaErrorInvalidValue;
    const CudaPrologue p = prologue::merged(problem);
    if (!(p.batch * p.tall * p.wide)) return cudaSuccess;
    switch (p.dtype) {
        case CudaFloat::float32: return prologue::launch_from<float>(p, rounding, stream);
        case CudaFloat::bfloat16: return prologue::launch_from<device::Bfloat16>(p, rounding, stream);
        case CudaFloat::float16: return prologue::launch_from<device::Float16>(p, rounding, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace vpd
