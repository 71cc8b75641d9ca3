// Epilogue of the GEMM with eight neighbouring columns of a row per thread: 16 bytes of a result of 16 bits.
//
// What rows and columns need besides their sums lies in shared memory before the sums are there. A warp finishes 2 to 16
// rows in a step, and asks for the residuals of several steps before it uses the first. Results are those of the other
// epilogue, bit for bit. What is rare is left to that one: results whose columns or addresses are not multiples of 16
// bytes, silu, a residual of geglu, and one of another type than the result's, or of a result of 8 bits. Sums that
// several blocks share go to scratch memory as they do there.
#pragma once

#include "cuda/gemm_statistics.cuh"

namespace vpd::gemm {

// One row of the result, as ResultRow, but where it is in steps of eight numbers. out: NONE if there is no such row; the
// number of the row where several blocks share a sum.
struct alignas(16) WideRow {
    static constexpr uint32_t NONE = 0xffffffff;
    uint32_t out, residual;
    float scale;
    int32_t zero;

    __device__ bool exists() const { return out != NONE; }
    __device__ int64_t number() const { return out; }
};

template <typename T>
__device__ inline WideRow wide_row_of(const CudaGemm& p, const Plan& plan, const Position& at) {
    const ResultRow row = row_of<T>(p, at);
    if (!row.exists()) return {WideRow::NONE};
    return {plan.splits > 1 ? uint32_t(row.number()) : uint32_t(row.out / 8), uint32_t(row.residual / 8), row.scale,
            row.zero};
}

// Of the columns of a tile. Beyond the result there are zeros.
template <int COLUMNS>
struct alignas(16) TileColumns {
    float bias[COLUMNS], scale[COLUMNS];
    int32_t weight_sums[COLUMNS];
};

// What rows and columns of a tile need; by all `threads` together, which synchronise afterwards.
template <typename T, int COLUMNS>
__device__ inline void load_columns(const CudaGemm& p, const Tile& tile, TileColumns<COLUMNS>& to, int thread,
                                    int threads) {
    for (int i = thread; i < COLUMNS; i += threads) {
        const int column = tile.column + i;
        const bool valid = column < p.n;
        to.bias[i] = valid && p.bias ? load_global(p.bias + column) : 0.0f;
        if constexpr (Operand<T>::BYTES == 1) to.scale[i] = valid ? load_global(p.column_scales + column) : 0.0f;
        if constexpr (std::is_same_v<T, int8_t>)
            to.weight_sums[i] = valid ? int32_t(load_global(p.weight_sums + column)) : 0;
    }
}

// Eight neighbouring numbers of a result or residual.
template <typename Number>
struct alignas(16) Eight {
    uint32_t words[4];

    __device__ static Eight load(const Number* from) { return load_global(reinterpret_cast<const Eight*>(from)); }
    __device__ void add_to(float (&x)[8]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float low, high;
            unpack<Number>(words[i], low, high);
            x[2 * i] += low, x[2 * i + 1] += high;
        }
    }
    __device__ static Eight of(const float (&x)[8]) {
        Eight eight;
#pragma unroll
        for (int i = 0; i < 4; ++i) eight.words[i] = pack<Number>(x[2 * i], x[2 * i + 1]);
        return eight;
    }
    __device__ void store(Number* to) const { store_global(reinterpret_cast<Eight*>(to), *this); }
};
template <>
struct Eight<float> {
    Four<float> low, high;

    __device__ static Eight load(const float* from) {
        const Four<float>* const fours = reinterpret_cast<const Four<float>*>(from);
        return {load_global(fours), load_global(fours + 1)};
    }
    __device__ void add_to(float (&x)[8]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] += low.v[i], x[4 + i] += high.v[i];
    }
    __device__ static Eight of(const float (&x)[8]) { return {{x[0], x[1], x[2], x[3]}, {x[4], x[5], x[6], x[7]}}; }
    __device__ void store(float* to) const {
        Four<float>* const fours = reinterpret_cast<Four<float>*>(to);
        store_global(fours, low);
        store_global(fours + 1, high);
    }
};

// A result of 8 bits, of numbers that have been rounded.
template <>
struct alignas(8) Eight<int8_t> {
    uint2 words;

    // column: of the result. Factors and shifts are read again for each row: there are not enough registers for them.
    __device__ static Eight of(const CudaGemm& p, int column, const float (&x)[8]) {
        uint32_t words[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int first = column + 4 * half;
            const auto factors = load_global(reinterpret_cast<const Four<float>*>(p.round_factors + first));
            const auto shifts = load_global(reinterpret_cast<const Four<float>*>(p.round_shifts + first));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[half] |= rounded_to_int8(x[4 * half + i], factors.v[i], shifts.v[i]) << 8 * i;
        }
        return {uint2{words[0], words[1]}};
    }
    __device__ void store(int8_t* to) const { store_global(reinterpret_cast<uint2*>(to), words); }
};

// Eight columns of a tile, from `first` on.
template <typename T, int COLUMNS>
struct EightColumns {
    float scale[8] = {}, bias[8];
    int32_t weight_sums[8] = {};

    __device__ EightColumns(const TileColumns<COLUMNS>& from, int first) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            copy(from.bias + first + i, bias + i);
            if constexpr (Operand<T>::BYTES == 1) copy(from.scale + first + i, scale + i);
            if constexpr (std::is_same_v<T, int8_t>) copy(from.weight_sums + first + i, weight_sums + i);
        }
    }

    template <typename Number>
    __device__ static void copy(const Number* from, Number* to) {
        const Four<Number> four = *reinterpret_cast<const Four<Number>*>(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = four.v[i];
    }

    __device__ void scaled(const WideRow& row, const typename Operand<T>::Sum (&sums)[8], float (&x)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = scaled_sum<T>(row, sums[i], scale[i], bias[i], weight_sums[i]);
    }
};

// Eight sums in shared memory. Four lanes in a row begin with the first half and the next four with the second, so that
// eight lanes that read rows of 8 do so without bank conflicts.
template <typename Sum>
__device__ inline void read_eight(const Sum* from, int lane, Sum (&sums)[8]) {
    const bool swapped = lane & 4;
    const Four<Sum>* const halves = reinterpret_cast<const Four<Sum>*>(from);
    const Four<Sum> first = halves[swapped], second = halves[!swapped];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[i] = swapped ? second.v[i] : first.v[i];
        sums[4 + i] = swapped ? first.v[i] : second.v[i];
    }
}

// Numbers in place of sums.
template <typename Sum>
__device__ inline void put_eight(const float (&numbers)[8], Sum* to) {
    Four<Sum> halves[2];
#pragma unroll
    for (int i = 0; i < 8; ++i) put_number(halves[i / 4].v[i % 4], numbers[i]);
    reinterpret_cast<Four<Sum>*>(to)[0] = halves[0];
    reinterpret_cast<Four<Sum>*>(to)[1] = halves[1];
}

// The WIDTH columns of a tile from FIRST on, a power of two.
template <typename T, int COLUMNS, int FIRST, int WIDTH, typename Number, bool RESIDUAL, bool GEGLU>
__device__ inline void wide_rows(const CudaGemm& p, const Plan& plan, const Tile& tile,
                                 typename Operand<T>::Sum* staged, const WideRow* rows,
                                 const TileColumns<COLUMNS>& columns, int lane) {
    using Sum = typename Operand<T>::Sum;
    constexpr int ACROSS = WIDTH / (GEGLU ? 16 : 8);  // threads that share a row
    static_assert(WARP % ACROSS == 0);
    constexpr int DOWN = WARP / ACROSS, STEPS = ROWS_PER_WARP / DOWN;
    constexpr int AT_ONCE = STEPS < 4 ? STEPS : 4;  // steps whose residuals are on the way together
    const int across = lane % ACROSS * 8, down = lane / ACROSS;
    const int result_column = (tile.column + FIRST) / (GEGLU ? 2 : 1) + across;
    if (result_column >= plan.out_columns) return;
    const int column = FIRST + (GEGLU ? across / 16 * 32 + across % 16 : across);  // of the sums; gates are 16 further
    const EightColumns<T, COLUMNS> values(columns, column);
    const Number* const residual = static_cast<const Number*>(p.residual.data) + result_column;
    Number* const out = static_cast<Number*>(p.out.data) + result_column;
#pragma unroll 1
    for (int step = 0; step < STEPS; step += AT_ONCE) {
        Eight<Number> added[AT_ONCE];
        if constexpr (RESIDUAL) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const WideRow& row = rows[(step + i) * DOWN + down];
                if (row.exists()) added[i] = Eight<Number>::load(residual + int64_t(row.residual) * 8);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int number = (step + i) * DOWN + down;
            const WideRow row = rows[number];
            if (!row.exists()) continue;
            const Sum* const from = staged + number * pitch_of(COLUMNS) + column;
            Sum sums[8];
            float x[8];
            read_eight(from, lane, sums);
            values.scaled(row, sums, x);
            if constexpr (GEGLU) {
                float gate[8];
                read_eight(from + 16, lane, sums);
                // Read again for each row: there are not enough registers for all.
                EightColumns<T, COLUMNS>(columns, column + 16).scaled(row, sums, gate);
#pragma unroll
                for (int j = 0; j < 8; ++j) x[j] *= gelu(gate[j]);
            } else if (p.activation == CudaActivation::relu) {
#pragma unroll
                for (int j = 0; j < 8; ++j) x[j] = activated(CudaActivation::relu, x[j]);
            }
            if constexpr (RESIDUAL) added[i].add_to(x);
            if constexpr (std::is_same_v<Number, int8_t>) {
                Eight<Number>::of(p, result_column, x).store(out + int64_t(row.out) * 8);
            } else {
                const Eight<Number> stored = Eight<Number>::of(x);
                stored.store(out + int64_t(row.out) * 8);
                if (!GEGLU && plan.statistics) {
                    float numbers[8] = {};
                    stored.add_to(numbers);
                    put_eight(numbers, staged + number * pitch_of(COLUMNS) + column);
                }
            }
        }
    }
}

template <typename T, int COLUMNS, int FIRST, int WIDTH, typename Number>
__device__ inline void wide_rows_of(const CudaGemm& p, const Plan& plan, const Tile& tile,
                                    typename Operand<T>::Sum* staged, const WideRow* rows,
                                    const TileColumns<COLUMNS>& columns, int lane) {
    if (p.activation == CudaActivation::geglu)
        return wide_rows<T, COLUMNS, FIRST, WIDTH, Number, false, true>(p, plan, tile, staged, rows, columns, lane);
    if constexpr (!std::is_same_v<Number, int8_t>)
        if (p.residual.data)
            return wide_rows<T, COLUMNS, FIRST, WIDTH, Number, true, false>(p, plan, tile, staged, rows, columns, lane);
    wide_rows<T, COLUMNS, FIRST, WIDTH, Number, false, false>(p, plan, tile, staged, rows, columns, lane);
}

// The largest power of two in COLUMNS columns first, then the others.
template <typename T, int COLUMNS, typename Number>
__device__ inline void wide_columns(const CudaGemm& p, const Plan& plan, const Tile& tile,
                                    typename Operand<T>::Sum* staged, const WideRow* rows,
                                    const TileColumns<COLUMNS>& columns, int lane) {
    constexpr int WIDTH = COLUMNS >= 128 ? 128 : 64;
    wide_rows_of<T, COLUMNS, 0, WIDTH, Number>(p, plan, tile, staged, rows, columns, lane);
    if constexpr (COLUMNS > WIDTH)
        wide_rows_of<T, COLUMNS, WIDTH, COLUMNS - WIDTH, Number>(p, plan, tile, staged, rows, columns, lane);
}

// A warp finishes its 16 rows of a tile, whose sums are in shared memory; `rows` and `columns` are the tile's.
template <typename T, int COLUMNS>
__device__ inline void wide_epilogue(const CudaGemm& p, const Plan& plan, const Tile& tile,
                                     typename Operand<T>::Sum* staged, const WideRow* rows,
                                     const TileColumns<COLUMNS>& columns, int warp, int lane) {
    staged += warp * ROWS_PER_WARP * pitch_of(COLUMNS), rows += warp * ROWS_PER_WARP;
    if (plan.splits > 1) return store_part<typename Operand<T>::Sum, COLUMNS>(p, plan, tile, staged, rows, lane);
    if constexpr (std::is_same_v<T, int8_t>)
        if (p.round_factors) return wide_columns<T, COLUMNS, int8_t>(p, plan, tile, staged, rows, columns, lane);
    switch (p.out_dtype) {
        case CudaFloat::float32: return wide_columns<T, COLUMNS, float>(p, plan, tile, staged, rows, columns, lane);
        case CudaFloat::bfloat16: return wide_columns<T, COLUMNS, Bfloat16>(p, plan, tile, staged, rows, columns, lane);
        case CudaFloat::float16: return wide_columns<T, COLUMNS, Float16>(p, plan, tile, staged, rows, columns, lane);
    }
}

}  // namespace vpd::gemm
