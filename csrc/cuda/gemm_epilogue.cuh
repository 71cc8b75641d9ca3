// Epilogue of the GEMM: scales, bias, activation and residual, four neighbouring columns of a row per thread.
//
// A tile's sums come through shared memory, so that a warp then reads and writes whole rows of the result; or, where
// several blocks shared a sum, through scratch memory, where each left its part. Parts are added in their order.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/rounded_results.cuh"

namespace vpd::gemm {

template <typename Sum>
struct alignas(16) Four {
    Sum v[4];
};

template <typename Sum>
struct alignas(8) Two {
    Sum v[2];
};

// Of the sums of a tile in shared memory. Neighbouring rows start 8 banks apart: fragments are written and rows read
// without conflicts.
constexpr __host__ __device__ int pitch_of(int columns) { return columns + 8; }

// One row of the result: where it is, and what all its columns share. position < 0: there is no such row.
struct ResultRow {
    int64_t out, residual;
    float scale;
    int32_t zero, position;

    __device__ bool exists() const { return position >= 0; }
    __device__ int64_t number() const { return position; }
};

template <typename T>
__device__ inline ResultRow row_of(const CudaGemm& p, const Position& at) {
    ResultRow row{};
    row.position = -1;
    if (!inside(p, at)) return row;
    row.position = int32_t((at.image * p.out_height + at.y) * p.out_width + at.x);
    row.out = at.image * p.out.image + at.y * p.out.row + at.x * p.out.column;
    row.residual = at.image * p.residual.image + at.y * p.residual.row + at.x * p.residual.column;
    if constexpr (Operand<T>::BYTES == 1)
        row.scale = p.row_scales ? load_global(p.row_scales + (p.scale_per_image ? at.image : row.position)) : 1.0f;
    // |u8 - zero| is at most 255, and 65536 such products stay below 2^31.
    if constexpr (std::is_same_v<T, int8_t>)
        row.zero = p.row_zeros ? int32_t(load_global(p.row_zeros + (p.scale_per_image ? at.image : row.position))) : 0;
    return row;
}

// A sum with its scales and its bias.
template <typename T, typename Row>
__device__ inline float scaled_sum(const Row& row, typename Operand<T>::Sum sum, float scale, float bias,
                                   int32_t weight_sum) {
    float value;
    if constexpr (std::is_same_v<T, int8_t>)
        value = float(sum - row.zero * weight_sum);
    else
        value = sum;
    // Not fused with the bias, so that sums of int8 give the same bits wherever they are computed.
    if constexpr (Operand<T>::BYTES == 1) value = multiply_rounded(value, row.scale * scale);
    return value + bias;
}

// What all rows share of four columns.
template <typename T>
struct FourColumns {
    float scale[4] = {}, bias[4];
    int32_t weight_sums[4] = {};

    __device__ FourColumns(const CudaGemm& p, int first) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool valid = first + i < p.n;
            bias[i] = valid && p.bias ? load_global(p.bias + first + i) : 0.0f;
            if constexpr (Operand<T>::BYTES == 1) scale[i] = valid ? load_global(p.column_scales + first + i) : 0.0f;
            if constexpr (std::is_same_v<T, int8_t>)
                weight_sums[i] = valid ? int32_t(load_global(p.weight_sums + first + i)) : 0;
        }
    }

    __device__ float scaled(const ResultRow& row, typename Operand<T>::Sum sum, int i) const {
        return scaled_sum<T>(row, sum, scale[i], bias[i], weight_sums[i]);
    }
};

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }

__device__ inline float activated(CudaActivation activation, float x) {
    if (activation == CudaActivation::relu) return x < 0.0f ? 0.0f : x;  // keeps NaN
    if (activation == CudaActivation::silu) return x / (1.0f + expf(-x));
    return x;
}

template <typename Narrow>
__device__ inline void add_four(float (&x)[4], const Narrow* from, int count, bool at_once) {
    if (at_once) {
        const uint2 words = load_global(reinterpret_cast<const uint2*>(from));
        float low, high;
        unpack<Narrow>(words.x, low, high);
        x[0] += low, x[1] += high;
        unpack<Narrow>(words.y, low, high);
        x[2] += low, x[3] += high;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) x[i] += to_float(load_global(from + i));
}
template <>
__device__ inline void add_four<float>(float (&x)[4], const float* from, int count, bool at_once) {
    Four<float> four{};
    if (at_once)
        four = load_global(reinterpret_cast<const Four<float>*>(from));
    else
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) four.v[i] = load_global(from + i);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] += four.v[i];
}

template <typename Narrow>
__device__ inline void store_four(const float (&x)[4], Narrow* to, int count, bool at_once) {
    if (at_once) {
        store_global(reinterpret_cast<uint2*>(to), uint2{pack<Narrow>(x[0], x[1]), pack<Narrow>(x[2], x[3])});
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) store_global(to + i, from_float<Narrow>(x[i]));
}
template <>
__device__ inline void store_four<float>(const float (&x)[4], float* to, int count, bool at_once) {
    if (at_once) {
        store_global(reinterpret_cast<Four<float>*>(to), Four<float>{{x[0], x[1], x[2], x[3]}});
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) store_global(to + i, x[i]);
}

__device__ inline void store_int8(const CudaGemm& p, const float (&x)[4], int column, int8_t* to, int count,
                                  bool at_once) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count)
            word |= rounded_to_int8(x[i], load_global(p.round_factors + column + i),
                                    load_global(p.round_shifts + column + i))
                    << 8 * i;
    if (at_once) return store_global(reinterpret_cast<uint32_t*>(to), word);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) store_global(to + i, int8_t(word >> 8 * i));
}

// The last of it: x + residual is stored from column `column` of the result on.
__device__ inline void add_residual_and_store(const CudaGemm& p, const Plan& plan, const ResultRow& row, int column,
                                              float (&x)[4]) {
    const int count = plan.out_columns - column < 4 ? int(plan.out_columns - column) : 4;
    const bool at_once = plan.four_at_once && count == 4;
    const int64_t from = row.residual + column, to = row.out + column;
    if (p.residual.data) switch (p.residual_dtype) {
            case CudaFloat::float32:
                add_four(x, static_cast<const float*>(p.residual.data) + from, count, at_once);
                break;
            case CudaFloat::bfloat16:
                add_four(x, static_cast<const Bfloat16*>(p.residual.data) + from, count, at_once);
                break;
            case CudaFloat::float16:
                add_four(x, static_cast<const Float16*>(p.residual.data) + from, count, at_once);
                break;
        }
    if (p.round_factors) return store_int8(p, x, column, static_cast<int8_t*>(p.out.data) + to, count, at_once);
    switch (p.out_dtype) {
        case CudaFloat::float32: store_four(x, static_cast<float*>(p.out.data) + to, count, at_once); break;
        case CudaFloat::bfloat16: store_four(x, static_cast<Bfloat16*>(p.out.data) + to, count, at_once); break;
        case CudaFloat::float16: store_four(x, static_cast<Float16*>(p.out.data) + to, count, at_once); break;
    }
}

// What a thread does: four columns of the result, from the same of the sums, or for geglu from values and gates.
template <typename T, bool GEGLU>
struct Epilogue {
    using Sums = Four<typename Operand<T>::Sum>;
    int result_column, column;  // of the result; of the sums. Gates are 16 columns further
    FourColumns<T> values, gates;

    __device__ Epilogue(const CudaGemm& p, int result_column_)
        : result_column(result_column_),
          column(GEGLU ? result_column / 16 * 32 + result_column % 16 : result_column),
          values(p, column),
          gates(p, GEGLU ? column + 16 : int(p.n)) {}

    // load(column): the sums of this row at four columns.
    template <typename Load>
    __device__ void apply(const CudaGemm& p, const Plan& plan, const ResultRow& row, Load load) const {
        float x[4];
        const Sums sums = load(column);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = values.scaled(row, sums.v[i], i);
        if constexpr (GEGLU) {
            const Sums gate_sums = load(column + 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] *= gelu(gates.scaled(row, gate_sums.v[i], i));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] = activated(p.activation, x[i]);
        }
        add_residual_and_store(p, plan, row, result_column, x);
    }
};

template <typename T, int COLUMNS, bool GEGLU>
__device__ inline void epilogue_rows(const CudaGemm& p, const Plan& plan, const Tile& tile,
                                     const typename Operand<T>::Sum* staged, const ResultRow* rows, int lane) {
    constexpr int ACROSS = COLUMNS / (GEGLU ? 8 : 4);  // threads that share a row
    static_assert(WARP % ACROSS == 0);
    const int first = GEGLU ? tile.column / 2 : tile.column;
    const Epilogue<T, GEGLU> epilogue(p, first + lane % ACROSS * 4);
    if (epilogue.result_column >= plan.out_columns) return;
#pragma unroll 1
    for (int row = lane / ACROSS; row < ROWS_PER_WARP; row += WARP / ACROSS)
        if (rows[row].exists())
            epilogue.apply(p, plan, rows[row], [&](int column) {
                return *reinterpret_cast<const Four<typename Operand<T>::Sum>*>(staged + row * pitch_of(COLUMNS) +
                                                                                column - tile.column);
            });
}

// A part of the sums of this warp's rows goes to scratch (splits, rows, n).
template <typename Sum, int COLUMNS, typename Row>
__device__ inline void store_part(const CudaGemm& p, const Plan& plan, const Tile& tile, const Sum* staged,
                                  const Row* rows, int lane) {
    Sum* const part = static_cast<Sum*>(p.scratch) + tile.split * plan.rows * p.n + tile.column;
    const int columns = p.n - tile.column < COLUMNS ? int(p.n - tile.column) : COLUMNS;
    for (int i = lane; i < ROWS_PER_WARP * COLUMNS / 4; i += WARP) {
        const int row = i / (COLUMNS / 4), column = i % (COLUMNS / 4) * 4;
        if (!rows[row].exists()) continue;
        const Sum* const from = staged + row * pitch_of(COLUMNS) + column;
        Sum* const to = part + rows[row].number() * p.n + column;
        if (p.n % 4 == 0 && column < columns)
            store_global(reinterpret_cast<Four<Sum>*>(to), *reinterpret_cast<const Four<Sum>*>(from));
        else
            for (int j = 0; j < 4; ++j)
                if (column + j < columns) store_global(to + j, from[j]);
    }
}

// Shared memory of the epilogue.
constexpr __host__ __device__ int epilogue_bytes(int rows, int columns) {
    return rows * pitch_of(columns) * 4 + rows * int(sizeof(ResultRow));
}

// A warp finishes 16 rows of a tile, whose sums are in shared memory in front of `rows`, one per row of the tile.
template <typename T, int COLUMNS>
__device__ inline void tile_epilogue(const CudaGemm& p, const Plan& plan, const Tile& tile,
                                     const typename Operand<T>::Sum* staged, ResultRow* rows, int warp, int lane) {
    staged += warp * ROWS_PER_WARP * pitch_of(COLUMNS), rows += warp * ROWS_PER_WARP;
    if (lane < ROWS_PER_WARP) rows[lane] = row_of<T>(p, position_of(plan, tile, warp * ROWS_PER_WARP + lane));
    sync_warp();
    if (plan.splits > 1)
        store_part<typename Operand<T>::Sum, COLUMNS>(p, plan, tile, staged, rows, lane);
    else if (p.activation == CudaActivation::geglu)
        epilogue_rows<T, COLUMNS, true>(p, plan, tile, staged, rows, lane);
    else
        epilogue_rows<T, COLUMNS, false>(p, plan, tile, staged, rows, lane);
}

constexpr int MERGE_THREADS = 128;

template <typename T, bool GEGLU>
__device__ inline void merge_four(const CudaGemm& p, const Plan& plan, const ResultRow& row, int result_column) {
    using Sum = typename Operand<T>::Sum;
    const Sum* const part = static_cast<const Sum*>(p.scratch) + row.number() * p.n;
    Epilogue<T, GEGLU>(p, result_column).apply(p, plan, row, [&](int column) {
        Four<Sum> total{};
        for (int split = 0; split < plan.splits; ++split) {
            const Sum* const from = part + split * plan.rows * p.n + column;
            Four<Sum> four{};
            if (p.n % 4 == 0)
                four = load_global(reinterpret_cast<const Four<Sum>*>(from));
            else
                for (int i = 0; i < 4; ++i)
                    if (column + i < p.n) four.v[i] = load_global(from + i);
            for (int i = 0; i < 4; ++i) total.v[i] += four.v[i];
        }
        return total;
    });
}

// Adds up the parts of the sums, in their order, and finishes them: four columns of the result per thread.
template <typename T>
__global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(const CudaGemm p, const Plan plan) {
    const int across = int((plan.out_columns + 3) / 4);
    const int64_t index = int64_t(blockIdx.x) * MERGE_THREADS + threadIdx.x;
    if (index >= plan.rows * across) return;
    const int number = int(index / across), column = int(index - int64_t(number) * across) * 4;
    const int line = number / int(p.out_width);
    const Position at{line / int(p.out_height), line % int(p.out_height), number - line * int(p.out_width)};
    const ResultRow row = row_of<T>(p, at);
    if (p.activation == CudaActivation::geglu)
        merge_four<T, true>(p, plan, row, column);
    else
        merge_four<T, false>(p, plan, row, column);
}

}  // namespace vpd::gemm
