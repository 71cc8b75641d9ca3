// Attention over any number of keys. The scores of a tile of queries and a piece of the keys are in the registers; what
// leaves them are probabilities, as elements of the second product.
#include <cmath>
#include <cstring>

#include "cpu/attention_tile.h"

namespace vpd::VPD_ISA {
namespace {

constexpr int KEYS = MAX_ROWS;             // keys of a piece
constexpr int64_t TILE = COLUMNS * LANES;  // queries of a tile
constexpr int64_t PIECES = 120 / KEYS;  // pieces of a block, whose probabilities should stay in the first cache level
// Elements of a score that are added up in one sum, because roundings accumulate.
constexpr int64_t MAX_SUMMED_ELEMENTS = 160;
// Scores may exceed their reference by this power of 2 before the running sums are rescaled.
constexpr float GROWTH = 8.0f;
// If packed K and V of a head exceed MAX_HEAD_FLOATS, they leave the second cache level. Up to MAX_TILES tiles of queries
// then share every read of them, as many as fit into MAX_TILES_FLOATS of q and out.
constexpr int64_t MAX_HEAD_FLOATS = 128 << 10;
constexpr int64_t MAX_TILES = 4;
constexpr int64_t MAX_TILES_FLOATS = 96 << 10;

// K of a head is packed as pieces [element][key], each with a weight per key behind it, 0 for keys that are not there;
// V as blocks of panels [element along the keys][dimension].
template <typename E>
struct Layout {
    static constexpr int64_t PIECE_ELEMENTS = KEYS / E::WIDTH;  // along the keys
    static constexpr int64_t BLOCK_ELEMENTS = PIECES * PIECE_ELEMENTS;

    explicit Layout(const SelfAttentionPlan& plan)
        : q_elements(elements<E>(plan.dim)),
          pieces(ceil_divide(plan.tokens, KEYS)),
          piece_size(q_elements * KEYS + PIECE_ELEMENTS),
          panel(panel_of(plan.dim)),
          panels(ceil_divide(plan.dim, panel)),
          tiles(packed_size() <= MAX_HEAD_FLOATS ? 1 : fitting_tiles()) {}

    int64_t padded_dim() const { return panel * panels; }
    int64_t k_size() const { return pieces * piece_size; }
    int64_t packed_size() const { return padded(k_size() + pieces * PIECE_ELEMENTS * padded_dim()); }

    const int64_t q_elements, pieces, piece_size;
    const int64_t panel, panels;  // dimensions of a panel, panels of a head
    const int64_t tiles;          // tiles that share each read of K and V

private:
    // Rows of a panel: many, for few loads, but not with much padding.
    static int64_t panel_of(int64_t dim) {
        int64_t best = 1, min_cost = 3 * dim;
        for (int64_t rows = 2; rows <= MAX_ROWS; ++rows) {
            const int64_t cost = ceil_divide(dim, rows) * (rows + 2);
            if (cost <= min_cost) best = rows, min_cost = cost;
        }
        return best;
    }

    int64_t fitting_tiles() const {
        const int64_t fitting = MAX_TILES_FLOATS / ((q_elements + padded_dim()) * TILE);
        return fitting < 1 ? 1 : smaller(fitting, MAX_TILES);
    }
};

// Running statistics of the softmax of a tile. Scores are q k, not yet scaled.
struct State {
    float reference[TILE];  // the score whose probability is 1
    float limit[TILE];      // the largest score that this reference allows
    float maximum[TILE];    // the largest score of the latest piece
    float sum[TILE];        // the sum of the probabilities that are not in `total` yet
    float total[TILE];
};

// Constants that turn scores into probabilities.
struct Scaling {
    explicit Scaling(float scale)
        : factor(std::fabs(scale) * 1.44269504088896341f), growth(GROWTH / factor), minimum(-126.0f / factor) {}

    const float factor;   // converts scores to powers of 2
    const float growth;   // GROWTH as a score
    const float minimum;  // the score whose probability is 2^-126
};

// One element of the second product: the probabilities of as many keys as it holds, whose scores exceed the reference by
// `above`.
VPD_INLINE f32x16 probabilities(F32, const f32x16* above, const Scaling& scaling) {
    return exp2_of_nonpositive(multiply(broadcast(scaling.factor), above[0]));  // GROWTH is as good
}

#if defined(__AVX512BF16__)
// The upper half is 2^(factor * above), rounded to bfloat16: 2^x = 2^n * 2^f with n = floor(x), and 2^f a polynomial of
// degree 3 on [0, 1] (minimax in the relative error, 7.5e-5, where the rounding has 2e-3) with half a unit added.
// Results below 2^-126 become about 2^-126. NaN stays NaN.
VPD_INLINE f32x16 rounded_exp2(f32x16 above, const Scaling& scaling) {
    // 1.5 * 2^23 has no bits for a fraction.
    const f32x16 factor = broadcast(scaling.factor), magic = broadcast(12582912.0f);
    above = max(broadcast(scaling.minimum), above);
    const f32x16 shifted = _mm512_fmadd_round_ps(above, factor, magic, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const f32x16 f = _mm512_fmsub_ps(above, factor, subtract(shifted, magic));
    f32x16 p = broadcast(0.078024589f);
    p = multiply_add(p, f, broadcast(0.22606723f));
    p = multiply_add(p, f, broadcast(0.69583338f));
    p = multiply_add(p, f, broadcast(0.99992520f + 0.00390625f));
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

VPD_INLINE f32x16 probabilities(Bf16x2, const f32x16* above, const Scaling& scaling) {
    return join_upper_halves(rounded_exp2(above[0], scaling), rounded_exp2(above[1], scaling));
}
#endif

// c[ROWS][query] (+)= a[element][ROWS] * b[element][query]. Sums are added up when they are complete: the roundings of
// thousands of terms in one sum would add up, too.
template <typename E, int ROWS>
void add_product(const float* a, const float* b, int64_t size, float* c, bool add_to_c = true) {
    f32x16 sum[ROWS][COLUMNS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j) sum[r][j] = broadcast(0.0f);
    accumulate<E>(LeftOperand{a, 1, ROWS}, b, size, TILE, sum);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j) {
            float* to = c + r * TILE + j * LANES;
            store(to, add_to_c ? add(load(to), sum[r][j]) : sum[r][j]);
        }
}

// add_product for a number of rows known at run time only.
template <typename E, int ROWS = MAX_ROWS>
VPD_INLINE void add_product_of(int64_t rows, const float* a, const float* b, int64_t size, float* c) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return add_product_of<E, ROWS - 1>(rows, a, b, size, c);
    }
    add_product<E, ROWS>(a, b, size, c);
}

// The probabilities p[element along the keys][query] of a piece, or false if a score is above its limit. The first
// piece of all sets references and limits.
template <typename E>
bool find_probabilities(const float* k, const float* q, int64_t q_elements, const Scaling& scaling, bool first,
                        State& state, float* p) {
    float earlier[KEYS * TILE];  // of scores that have many elements
    const int64_t parts = ceil_divide(q_elements, MAX_SUMMED_ELEMENTS), size = ceil_divide(q_elements, parts);
    for (int64_t part = 0; part + 1 < parts; ++part, k += size * KEYS, q += size * TILE)
        add_product<E, KEYS>(k, q, size, earlier, part > 0);
    const int64_t rest = q_elements - (parts - 1) * size;
    const float* weights = k + rest * KEYS;
    f32x16 scores[KEYS][COLUMNS];
#pragma GCC unroll 16
    for (int r = 0; r < KEYS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j) scores[r][j] = broadcast(0.0f);
    accumulate<E>(LeftOperand{k, 1, KEYS}, q, rest, TILE, scores);
    if (parts > 1) {
#pragma GCC unroll 16
        for (int r = 0; r < KEYS; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < COLUMNS; ++j) scores[r][j] = add(scores[r][j], load(earlier + r * TILE + j * LANES));
    }
    uint32_t too_large = 0;
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) {
        f32x16 maximum = scores[0][j];
#pragma GCC unroll 16
        for (int r = 1; r < KEYS; ++r) maximum = max(scores[r][j], maximum);
        if (first) {
            store(state.reference + j * LANES, maximum);
            store(state.limit + j * LANES, add(maximum, broadcast(scaling.growth)));
        } else {
            store(state.maximum + j * LANES, maximum);
            too_large |= bits(greater(maximum, load(state.limit + j * LANES)));
        }
    }
    if (too_large) return false;
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) {
        const f32x16 reference = load(state.reference + j * LANES);
        f32x16 sum = broadcast(0.0f);
#pragma GCC unroll 16
        for (int r = 0; r < KEYS; r += E::WIDTH) {
            f32x16 above[E::WIDTH];
#pragma GCC unroll 2
            for (int w = 0; w < E::WIDTH; ++w) above[w] = subtract(scores[r + w][j], reference);
            const f32x16 element = probabilities(E{}, above, scaling);
            store(p + r / E::WIDTH * TILE + j * LANES, element);
            sum = E::multiply_add(element, broadcast(weights[r / E::WIDTH]), sum);
        }
        store(state.sum + j * LANES, add(load(state.sum + j * LANES), sum));
    }
    return true;
}

// Computes a few tiles of queries of one head after the other.
template <typename E, typename T>
class Worker {
public:
    using L = Layout<E>;

    Worker(const SelfAttentionPlan& plan, const float* packed, float* memory)
        : plan_(plan), layout_(plan), scaling_(plan.scale), packed_(packed), p_(memory) {
        rows_ = p_ + L::BLOCK_ELEMENTS * TILE;
        float* next = rows_ + plan.dim * TILE;
        for (int64_t t = 0; t < layout_.tiles; ++t) {
            tiles_[t].q = next;
            tiles_[t].out = next += layout_.q_elements * TILE;
            next += layout_.padded_dim() * TILE;
        }
    }

    static SelfAttentionSizes sizes(const SelfAttentionPlan& plan) {
        const L layout(plan);
        const int64_t rows = L::BLOCK_ELEMENTS + plan.dim + layout.tiles * (layout.q_elements + layout.padded_dim());
        return {layout.packed_size(), rows * TILE, layout.tiles * TILE};
    }

    void run(int64_t image, int64_t head, int64_t first) {
        const int64_t count = smaller(plan_.queries - first, layout_.tiles * TILE), tiles = ceil_divide(count, TILE);
        const T* q = static_cast<const T*>(plan_.q) + image * plan_.q_stride[0] + head * plan_.dim;
        for (int64_t t = 0; t < tiles; ++t)
            load_tile(tiles_[t], q + (first + t * TILE) * plan_.q_stride[1], smaller(count - t * TILE, TILE));
        const int64_t context = plan_.contexts == 1 ? 0 : image;
        const float* k = packed_ + (context * plan_.heads + head) * layout_.packed_size();
        const float* v = k + layout_.k_size();
        for (int64_t piece = 0; piece < layout_.pieces; piece += PIECES) {
            const int64_t pieces = smaller(layout_.pieces - piece, PIECES);
            for (int64_t t = 0; t < tiles; ++t) add_block(tiles_[t], k, v, pieces, piece == 0);
            k += pieces * layout_.piece_size;
            v += pieces * L::PIECE_ELEMENTS * layout_.padded_dim();
        }
        T* out = static_cast<T*>(plan_.out) + image * plan_.out_stride[0] + head * plan_.dim;
        for (int64_t t = 0; t < tiles; ++t)
            normalize_and_store(tiles_[t], out + (first + t * TILE) * plan_.out_stride[1],
                                smaller(count - t * TILE, TILE));
    }

private:
    struct Tile {
        float *q, *out;  // [element][query], [dimension][query]
        State state;
    };

    void load_tile(Tile& tile, const T* queries, int64_t count) {
        load_queries<E>(queries, plan_.q_stride[1], count, plan_.dim, plan_.scale, tile.q, TILE);
        std::memset(tile.out, 0, static_cast<size_t>(layout_.padded_dim() * TILE) * sizeof(float));
        std::memset(&tile.state, 0, sizeof tile.state);
    }

    void add_block(Tile& tile, const float* k, const float* v, int64_t pieces, bool first) {
        const int64_t size = pieces * L::PIECE_ELEMENTS;
        int64_t done = 0;  // elements of p_ that are in tile.out already
        for (int64_t piece = 0; piece < pieces; ++piece, k += layout_.piece_size) {
            const int64_t position = piece * L::PIECE_ELEMENTS;
            if (probabilities_fit(tile, k, position, first && piece == 0)) continue;
            add_products(tile, v, size, done, position);
            done = position;
            raise_references(tile);
            probabilities_fit(tile, k, position, false);
        }
        add_products(tile, v, size, done, size);
    }

    bool probabilities_fit(Tile& tile, const float* k, int64_t position, bool first) {
        return find_probabilities<E>(k, tile.q, layout_.q_elements, scaling_, first, tile.state, p_ + position * TILE);
    }

    // Adds elements [first, last) of a block, which has `size`, to tile.out, and their sum to the total.
    void add_products(Tile& tile, const float* v, int64_t size, int64_t first, int64_t last) {
        if (first == last) return;
        for (int64_t i = 0; i < layout_.panels; ++i)
            add_product_of<E>(layout_.panel, v + (i * size + first) * layout_.panel, p_ + first * TILE, last - first,
                              tile.out + i * layout_.panel * TILE);
        for (int64_t i = 0; i < TILE; i += LANES) {
            store(tile.state.total + i, add(load(tile.state.total + i), load(tile.state.sum + i)));
            store(tile.state.sum + i, broadcast(0.0f));
        }
    }

    // Where a score is above the limit, the largest becomes the reference.
    void raise_references(Tile& tile) {
        State& state = tile.state;
        for (int64_t column = 0; column < TILE; column += LANES) {
            const f32x16 maximum = load(state.maximum + column), limit = load(state.limit + column);
            const f32x16 before = load(state.reference + column),
                         after = select(greater(maximum, limit), maximum, before);
            store(state.reference + column, after);
            store(state.limit + column, add(after, broadcast(scaling_.growth)));
            const f32x16 change = exp2_of_nonpositive(multiply(broadcast(scaling_.factor), subtract(before, after)));
            store(state.total + column, multiply(change, load(state.total + column)));
            for (int64_t i = column; i < layout_.padded_dim() * TILE; i += TILE)
                store(tile.out + i, multiply(change, load(tile.out + i)));
        }
    }

    void normalize_and_store(Tile& tile, T* to, int64_t count) {
        for (int64_t column = 0; column < TILE; column += LANES) {
            const f32x16 inverse = divide(broadcast(1.0f), load(tile.state.total + column));
            for (int64_t i = column; i < plan_.dim * TILE; i += TILE)
                store(tile.out + i, multiply(inverse, load(tile.out + i)));
        }
        store_columns(tile.out, TILE, count, plan_.dim, rows_, to, plan_.out_stride[1]);
    }

    const SelfAttentionPlan& plan_;
    const L layout_;
    const Scaling scaling_;
    const float* packed_;
    float *p_, *rows_;  // [element along the keys][query]; rows of queries to be stored
    Tile tiles_[MAX_TILES];
};

// The weights of an element's keys: 1 for the first `left` of them, 0 for the others.
template <typename E>
VPD_INLINE float weights_of(int64_t left) {
    if constexpr (E::WIDTH == 1)
        return left > 0 ? 1.0f : 0.0f;
    else
        return pair_of(left > 0 ? 0x3f80 : 0, left > 1 ? 0x3f80 : 0);
}

template <typename E, typename T>
void pack_k(const SelfAttentionPlan& plan, const Layout<E>& layout, const T* k, float* to) {
    for (int64_t first = 0; first < plan.tokens; first += KEYS, to += layout.piece_size) {
        const int64_t count = smaller(plan.tokens - first, KEYS);
        load_columns<E>(k + first * plan.k_stride[1], plan.k_stride[1], count, plan.dim, to, KEYS);
        // Keys that are not there repeat the last one, whose score is no new maximum.
        for (int64_t i = 0; i < layout.q_elements && count < KEYS; ++i)
            for (int64_t r = count; r < KEYS; ++r) to[i * KEYS + r] = to[i * KEYS + count - 1];
        for (int64_t i = 0; i < layout.PIECE_ELEMENTS; ++i)
            to[layout.q_elements * KEYS + i] = weights_of<E>(count - i * E::WIDTH);
    }
}

template <typename E, typename T>
void pack_v(const SelfAttentionPlan& plan, const Layout<E>& layout, const T* v, float* to) {
    const int64_t all = layout.pieces * layout.PIECE_ELEMENTS;
    for (int64_t first = 0; first < all; first += layout.BLOCK_ELEMENTS) {
        const int64_t last = smaller(first + layout.BLOCK_ELEMENTS, all);
        for (int64_t d = 0; d < plan.dim; d += layout.panel) {
            const int64_t dims = smaller(plan.dim - d, layout.panel);
            for (int64_t i = first; i < last; ++i, to += layout.panel) {
                const int64_t key = i * E::WIDTH, valid = key < plan.tokens ? dims : 0;
                // A whole vector where it fits: the next elements overwrite what is too much.
                const int64_t size = valid && d + LANES <= plan.dim ? LANES : valid;
                const T* row = v + key * plan.v_stride[1] + d;
                load_row<E>(row, key + 1 < plan.tokens ? row + plan.v_stride[1] : nullptr, size, to);
                for (int64_t c = valid; c < layout.panel; ++c) to[c] = 0.0f;
            }
        }
    }
}

template <typename E, typename T>
void pack(const SelfAttentionPlan& plan, float* packed, int64_t first, int64_t last) {
    const Layout<E> layout(plan);
    for (int64_t item = first; item < last; ++item) {
        const int64_t context = item / plan.heads, start = item % plan.heads * plan.dim;
        float* to = packed + item * layout.packed_size();
        pack_k(plan, layout, static_cast<const T*>(plan.k) + context * plan.k_stride[0] + start, to);
        pack_v(plan, layout, static_cast<const T*>(plan.v) + context * plan.v_stride[0] + start, to + layout.k_size());
    }
}

template <typename E, typename T>
void work(const SelfAttentionPlan& plan, const float* packed, int64_t first, int64_t last, float* scratch) {
    Worker<E, T> worker(plan, packed, scratch);
    const int64_t size = Worker<E, T>::sizes(plan).queries, parts = ceil_divide(plan.queries, size);
    for (int64_t item = first; item < last; ++item)
        worker.run(item / parts / plan.heads, item / parts % plan.heads, item % parts * size);
}

}  // namespace

SelfAttentionSizes self_attention_sizes(const SelfAttentionPlan& plan) {
    return plan.bf16 ? Worker<Bf16Element, uint16_t>::sizes(plan) : Worker<F32, float>::sizes(plan);
}

void self_attention_pack(const SelfAttentionPlan& plan, float* packed, int64_t first, int64_t last) {
    plan.bf16 ? pack<Bf16Element, uint16_t>(plan, packed, first, last) : pack<F32, float>(plan, packed, first, last);
}

void self_attention_parts(const SelfAttentionPlan& plan, const float* packed, int64_t first, int64_t last,
                          float* scratch) {
    plan.bf16 ? work<Bf16Element, uint16_t>(plan, packed, first, last, scratch)
              : work<F32, float>(plan, packed, first, last, scratch);
}

}  // namespace vpd::VPD_ISA
