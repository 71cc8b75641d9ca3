// Plans and launches a GEMM; the kernels are in gemm_mma.cu and gemm_wgmma.cu.
#include "cuda/gemm.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/gemm_epilogue_wide.cuh"
#include "cuda/gemm_kernels.h"
#include "sizes.h"

namespace vpd {
namespace {

using namespace gemm;

constexpr int MAX_SPLITS = 16, MIN_STEPS_PER_SPLIT = 8;
constexpr int STEPS_OF_EPILOGUE = 3;  // that take as long as what is around the steps of a tile
constexpr int STEPS_OF_PERSISTENT_EPILOGUE = 2;
constexpr int64_t MAX_WIDE_REACH = int64_t(8) * WideRow::NONE;
constexpr int64_t MAX_COUNT = int64_t(1) << 30;  // of what is counted with 32 bits, with room for a tile more

// Returns whether positions of these sizes follow each other at one distance, and sets it.
bool evenly_spaced(const CudaPositions& x, const int64_t (&sizes)[3], int64_t& distance) {
    const int64_t strides[] = {x.image, x.row, x.column};
    int64_t expected = distance = 0;
    for (int i = 2; i >= 0; --i) {
        if (sizes[i] == 1) continue;
        if (!expected) expected = distance = strides[i];
        if (strides[i] != expected) return false;
        expected *= sizes[i];
    }
    return true;
}

// Returns the same problem with all positions in one line, if each reads itself alone: no tile then has idle rows.
CudaGemm in_one_line(const CudaGemm& p) {
    const int64_t sizes[] = {p.batch, p.out_height, p.out_width};
    const bool pointwise = p.kernel_height == 1 && p.kernel_width == 1 && p.stride == 1 && p.top == 0 && p.left == 0 &&
                           p.height == p.out_height && p.width == p.out_width;
    if (!pointwise || (p.scale_per_image && p.batch > 1)) return p;
    CudaGemm line = p;
    line.batch = line.height = line.out_height = 1;
    line.width = line.out_width = p.batch * p.height * p.width;
    for (CudaPositions* x : {&line.source[0], &line.source[1], &line.residual, &line.out}) {
        int64_t distance;
        if (x->data && !evenly_spaced(*x, sizes, distance)) return p;
        *x = {x->data, 0, 0, x->data ? distance : 0};
    }
    return line;
}

// Chooses the box of output positions with the fewest tiles; among those the widest that is not twice as wide as the
// image, so that rows which follow each other are positions that do.
void choose_box(const CudaGemm& p, Plan& plan) {
    int log = 0, widest = 0;
    while (1 << log < plan.rows_of_tile) ++log;
    while (widest < log && int64_t(1) << widest < p.out_width) ++widest;
    int64_t min_tiles = INT64_MAX;
    for (int log_x = widest; log_x >= 0; --log_x)
        for (int log_y = log - log_x; log_y >= 0; --log_y) {
            const int64_t x = ceil_divide(p.out_width, 1 << log_x), y = ceil_divide(p.out_height, 1 << log_y);
            const int64_t tiles = x * y * ceil_divide(p.batch, 1 << (log - log_x - log_y));
            if (tiles >= min_tiles) continue;
            min_tiles = tiles;
            plan.log_x = log_x, plan.log_y = log_y, plan.tiles_x = int(x), plan.tiles_y = int(y);
        }
    plan.row_tiles = int(std::min<int64_t>(min_tiles, INT32_MAX));
}

int float_bytes(CudaFloat dtype) { return dtype == CudaFloat::float32 ? 4 : 2; }

// Returns whether runs of so many columns, 4 or 8, of numbers of that size begin at multiples of their bytes, or of 16.
bool aligned(const CudaPositions& x, int number_bytes, int columns) {
    const int bytes = std::min(16, columns * number_bytes);
    return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && x.image % columns == 0 && x.row % columns == 0 &&
           x.column % columns == 0;
}

bool results_aligned(const CudaGemm& p, int columns) {
    return aligned(p.out, p.round_factors ? 1 : float_bytes(p.out_dtype), columns) &&
           (!p.residual.data || aligned(p.residual, float_bytes(p.residual_dtype), columns));
}

// Returns how far the last position of a result or residual is from the first.
int64_t reaches(const CudaPositions& x, const CudaGemm& p) {
    return (p.batch - 1) * x.image + (p.out_height - 1) * x.row + (p.out_width - 1) * x.column;
}

// Returns whether the wide epilogue computes this result; see gemm_epilogue_wide.cuh.
bool wide_takes(const CudaGemm& p, const Plan& plan) {
    const bool residual = p.residual.data &&
                          (p.activation == CudaActivation::geglu || p.round_factors || p.residual_dtype != p.out_dtype);
    if (plan.splits > 1) return plan.rows < WideRow::NONE;  // what follows the sums is for the merge
    for (const float* vector : {p.round_factors, p.round_shifts})
        if (vector && (!p.weight_sums || reinterpret_cast<uintptr_t>(vector) % 16)) return false;
    return plan.out_columns % 8 == 0 && results_aligned(p, 8) && reaches(p.out, p) < MAX_WIDE_REACH &&
           (!p.residual.data || reaches(p.residual, p) < MAX_WIDE_REACH) && p.activation != CudaActivation::silu &&
           !residual;
}

// Returns whether rows of a tile that follow each other are whole runs of `positions` positions of an image.
bool has_whole_runs(const CudaGemm& p, const Plan& plan, int64_t positions) {
    if (p.run < ROWS_PER_WARP || p.run > plan.rows_of_tile >> plan.log_cluster || (p.run & (p.run - 1)) ||
        positions % p.run)
        return false;
    const int64_t across = int64_t(1) << plan.log_x, box = across << plan.log_y;
    return p.run <= across ? p.out_width % p.run == 0 : across == p.out_width && p.run <= box;
}

// Sets whether and how the kernel finds statistics. positions: of an image.
void set_statistics(const CudaGemm& p, int64_t positions, Plan& plan) {
    const bool possible = plan.wide || plan.persistent;
    plan.statistics = p.statistics && !p.round_factors && possible && plan.splits == 1 &&
                      p.activation != CudaActivation::geglu && has_whole_runs(p, plan, positions);
    if (!plan.statistics) return;
    while (int64_t(1) << plan.log_run < p.run) ++plan.log_run;
    plan.runs = int(positions / p.run);
    plan.by_runs = divisor_of(plan.runs);
}

// Sets the size of tiles and how they divide the result.
void set_tiles(const CudaGemm& p, int rows_of_tile, int columns_of_tile, Plan& plan) {
    plan.rows_of_tile = rows_of_tile, plan.columns_of_tile = columns_of_tile;
    choose_box(p, plan);
    plan.column_tiles = int(ceil_divide(p.n, columns_of_tile));
}

int64_t tiles_of(const Plan& plan) { return int64_t(plan.row_tiles) * plan.column_tiles; }

// Sets by what kernels divide.
void set_divisors(const CudaGemm& p, Plan& plan) {
    plan.by_tiles = divisor_of(std::max<int64_t>(1, tiles_of(plan)));
    plan.by_group = divisor_of(int64_t(GROUP) * plan.column_tiles);
    plan.by_last_group = divisor_of(std::max(1, plan.row_tiles % GROUP));
    plan.by_tiles_x = divisor_of(std::max(1, plan.tiles_x)), plan.by_tiles_y = divisor_of(std::max(1, plan.tiles_y));
    for (int i = 0; i < 2; ++i) plan.by_blocks[i] = divisor_of(std::max(1, plan.blocks[i]));
    plan.by_kernel_width = divisor_of(p.kernel_width);
}

// Split-K: idle SMs share the sums, as long as each part is worth a pipeline.
void set_splits(Plan& plan, int processors) {
    const int64_t idle = processors / std::max<int64_t>(1, tiles_of(plan));
    const int splits =
        int(std::clamp<int64_t>(std::min<int64_t>(idle, plan.steps / MIN_STEPS_PER_SPLIT), 1, MAX_SPLITS));
    plan.share = int(ceil_divide(plan.steps, splits)), plan.splits = int(ceil_divide(plan.steps, plan.share));
}

// Lines of 128 bytes that multiprocessors copy one after the other, which is what takes most of the time.
int64_t copied_lines(const Plan& plan, int processors) {
    const int64_t tiles = ceil_divide(tiles_of(plan) * plan.splits, processors);
    return tiles * (plan.share + STEPS_OF_EPILOGUE) * (plan.rows_of_tile + plan.columns_of_tile);
}

// Takes tiles of 160 columns where these leave no columns idle and are done earlier; by the wide kernel only.
void widen_tiles(const CudaGemm& p, CudaOperand operand, Plan& plan, int processors) {
    Plan wider = plan;
    if (p.n % 160 || operand == CudaOperand::float8_e4m3fn) return;  // whose sums are kept twice
    set_tiles(p, plan.rows_of_tile, 160, wider);
    set_splits(wider, processors);
    if (wide_takes(p, wider) && copied_lines(wider, processors) < copied_lines(plan, processors)) plan = wider;
}

// Takes the persistent kernel if there is a tile for each processor: in the tiles that are done the earliest, by the
// products that processors compute one after the other.
void make_persistent(const CudaGemm& p, CudaOperand operand, Plan& plan, int processors) {
    constexpr int SIZES[][2] = {{128, 256}, {256, 160}, {256, 128}};
    const int even = processors / 2 * 2;
    int64_t least = INT64_MAX;
    for (const auto& [rows, columns] : SIZES) {
        Plan tried = plan;
        set_tiles(p, rows, columns, tried);
        if (tiles_of(tried) < even) continue;
        tried.row_tiles += tried.row_tiles % 2;  // clusters have two
        tried.splits = 1, tried.share = tried.steps, tried.persistent = true, tried.wide = false;
        if (even < 2 || !persistent_takes(p, tried, operand) || wgmma_refuses(p, tried, operand)) continue;
        const int64_t work =
            ceil_divide(tiles_of(tried), even) * rows * columns * (tried.steps + STEPS_OF_PERSISTENT_EPILOGUE);
        if (work < least) least = work, plan = tried;
    }
}

// Has blocks that share a sum add it in clusters, of a power of two, if the wide kernel then finishes the result.
void gather_splits(const CudaGemm& p, Plan& plan) {
    Plan tried = plan;
    while (2 << tried.log_cluster <= std::min(plan.splits, MAX_CLUSTER)) ++tried.log_cluster;
    tried.splits = 1, tried.share = int(ceil_divide(plan.steps, 1 << tried.log_cluster));
    if (plan.splits > 1 && wide_takes(p, tried)) plan = tried;
}

const char* check_sizes(const CudaGemm& p, CudaOperand operand) {
    const int bytes = bytes_of(operand);
    for (int64_t size :
         {p.height, p.width, p.out_height, p.out_width, p.kernel_height, p.kernel_width, p.stride, p.n, p.channels[0]})
        if (size < 1 || size >= MAX_COUNT) return "a size is not positive, or too large";
    if (p.batch < 0 || p.batch >= MAX_COUNT || p.channels[1] < 0 || p.top < 0 || p.left < 0 || p.top >= MAX_COUNT ||
        p.left >= MAX_COUNT)
        return "a size is negative, or too large";
    if (p.batch * p.out_height >= MAX_COUNT || p.batch * p.out_height * p.out_width >= MAX_COUNT ||
        p.height * p.width >= MAX_COUNT)
        return "there are too many positions";
    if (p.out_height * p.stride >= MAX_COUNT || p.out_width * p.stride >= MAX_COUNT) return "the stride is too large";
    const int64_t channels = p.channels[0] + p.channels[1];
    if (p.kernel_height * p.kernel_width >= MAX_COUNT || p.kernel_height * p.kernel_width * channels >= MAX_COUNT)
        return "a row has too many columns";
    for (int i = 0; i < 2; ++i) {
        if (p.channels[i] * bytes % 16) return "the channels of a source are no multiple of 16 bytes";
        if (reinterpret_cast<uintptr_t>(p.source[i].data) % 16)
            return "the address of a source is no multiple of 16 bytes";
        for (int64_t stride : {p.source[i].image, p.source[i].row, p.source[i].column})
            if (p.channels[i] && (stride < 0 || stride * bytes % 16))
                return "a stride of a source is no multiple of 16 bytes";
    }
    if (reinterpret_cast<uintptr_t>(p.weight) % 16) return "the address of the weight is no multiple of 16 bytes";
    if (p.activation == CudaActivation::geglu && p.n % 32) return "geglu of values that are no runs of 16";
    if (p.batch == 0) return nullptr;
    const bool integers = operand == CudaOperand::int8;
    if ((bytes == 1) != bool(p.column_scales) || (p.row_scales && bytes != 1) ||
        (!p.row_scales && bytes == 1 && !integers))
        return "8 bits, and only those, have scales";
    if (integers != bool(p.weight_sums) || bool(p.row_zeros) != (integers && p.row_scales))
        return "int8, and only that, has zeros and sums";
    if (!p.round_factors != !p.round_shifts) return "factors and shifts of a result belong together";
    return nullptr;
}

// Plans the kernels of a problem. Returns why there is no plan, or nullptr.
const char* make_plan(CudaGemm& p, CudaOperand operand, CudaInstructions instructions, Plan& plan, bool& wgmma) {
    if (const char* reason = check_sizes(p, operand)) return reason;
    const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
    if (major < 8) return "the device is older than compute capability 8.0";
    const int64_t positions = p.out_height * p.out_width;
    p = in_one_line(p);
    const int bytes = bytes_of(operand), taps = int(p.kernel_height * p.kernel_width);
    for (int i = 0; i < 2; ++i) plan.blocks[i] = int(ceil_divide(p.channels[i] * bytes, STEP_BYTES));
    plan.steps = taps * (plan.blocks[0] + plan.blocks[1]);
    plan.rows = p.batch * p.out_height * p.out_width;
    plan.weight_columns = taps * (p.channels[0] + p.channels[1]);
    plan.out_columns = p.activation == CudaActivation::geglu ? p.n / 2 : p.n;
    plan.four_at_once = results_aligned(p, 4);
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);

    const char* reason = major == 9 ? nullptr : "the device has no wgmma that this was compiled for";
    if (!reason && instructions != CudaInstructions::mma) {
        set_tiles(p, WGMMA_ROWS, 128, plan);
        if (p.n <= 64 || tiles_of(plan) < processors) set_tiles(p, WGMMA_ROWS, 64, plan);
        reason = wgmma_refuses(p, plan, operand);
    }
    wgmma = !reason && instructions != CudaInstructions::mma;
    if (!wgmma) {
        if (instructions != CudaInstructions::automatic && instructions != CudaInstructions::mma) return reason;
        if (operand == CudaOperand::float8_e4m3fn) return reason ? reason : "mma does not multiply float8_e4m3fn";
        set_tiles(p, 128, 128, plan);
        if (tiles_of(plan) < processors) set_tiles(p, 64, 64, plan);
    }
    set_splits(plan, processors);
    const bool clusters = instructions == CudaInstructions::wgmma_cluster;
    const bool persistent = clusters || instructions == CudaInstructions::wgmma_persistent;
    if (wgmma && (persistent || instructions == CudaInstructions::wgmma_wide)) plan.wide = wide_takes(p, plan);
    if (plan.wide) widen_tiles(p, operand, plan, processors);
    if (wgmma && persistent) make_persistent(p, operand, plan, processors);
    if (plan.wide && clusters) gather_splits(p, plan);
    if ((tiles_of(plan) * plan.splits << plan.log_cluster) >= MAX_COUNT ||
        plan.rows * ceil_divide(plan.out_columns, 4) >= MAX_COUNT * MERGE_THREADS)
        return "the result has too many elements";
    set_divisors(p, plan);
    set_statistics(p, positions, plan);
    return nullptr;
}

int64_t scratch_of(const CudaGemm& p, const Plan& plan) {
    return plan.splits > 1 ? plan.splits * plan.rows * p.n * 4 : 0;
}

template <typename T>
cudaError_t merge(const CudaGemm& p, const Plan& plan, cudaStream_t stream) {
    const int64_t blocks = ceil_divide(plan.rows * ceil_divide(plan.out_columns, 4), MERGE_THREADS);
    return launch_kernel(merge_kernel<T>, blocks, MERGE_THREADS, 0, 1, stream, p, plan);
}

}  // namespace

const char* gemm_cuda_refuses(const CudaGemm& problem, CudaOperand operand, CudaInstructions instructions) {
    CudaGemm p = problem;
    Plan plan{};
    bool wgmma;
    return make_plan(p, operand, instructions, plan, wgmma);
}

bool gemm_cuda_finds_statistics(const CudaGemm& problem, CudaOperand operand, CudaInstructions instructions) {
    CudaGemm p = problem;
    Plan plan{};
    bool wgmma;
    return !make_plan(p, operand, instructions, plan, wgmma) && plan.statistics;
}

int64_t gemm_cuda_scratch(const CudaGemm& problem, CudaOperand operand, CudaInstructions instructions) {
    CudaGemm p = problem;
    Plan plan{};
    bool wgmma;
    return make_plan(p, operand, instructions, plan, wgmma) ? 0 : scratch_of(p, plan);
}

cudaError_t gemm_cuda(const CudaGemm& problem, CudaOperand operand, CudaInstructions instructions,
                      cudaStream_t stream) {
    CudaGemm p = problem;
    Plan plan{};
    bool wgmma;
    if (make_plan(p, operand, instructions, plan, wgmma)) return cudaErrorInvalidValue;
    if (plan.rows == 0) return cudaSuccess;
    if (scratch_of(p, plan) && !p.scratch) return cudaErrorInvalidValue;
    if (plan.persistent) return launch_persistent(p, plan, operand, stream);
    const cudaError_t status = wgmma ? launch_wgmma(p, plan, operand, stream) : launch_mma(p, plan, operand, stream);
    if (status != cudaSuccess || plan.splits == 1) return status;
    switch (operand) {
        case CudaOperand::int8: return merge<int8_t>(p, plan, stream);
        case CudaOperand::float8_e4m3fn: return merge<Float8>(p, plan, stream);
        default: return merge<Bfloat16>(p, plan, stream);  // float16 has the same sums
    }
}

}  // namespace vpd
