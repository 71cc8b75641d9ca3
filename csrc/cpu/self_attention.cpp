// Attention over any number of keys. The scores of a tile of queries and a piece of the keys are in the registers; what
// leaves them are probabilities, as elements of the second product.
#include "cpu/self_attention.h"

#include <cmath>
#include <cstring>

#include "cpu/attention_tile.h"

namespace vpd::VPD_ISA {
namespace {

constexpr int KEYS = MOST_ROWS;                // of a piece
constexpr int64_t TILE = COLUMNS * LANES;      // queries
constexpr int64_t PIECES = 120 / KEYS;         // of a block: its probabilities should stay in the first cache level
constexpr int64_t MOST_ELEMENTS = 160;         // of a score that are added up in one go: the roundings add up, too
constexpr float GROWTH = 8.0f;                 // of scores beyond their reference, in powers of 2
constexpr int64_t MOST_TILES = 4;              // that share what is read of K and V, if these leave the second cache
constexpr int64_t FLOATS_OF_HEAD = 128 << 10;  // level: beyond this size of K and V,
constexpr int64_t FLOATS_OF_TILES = 96 << 10;  // and up to this size of q and out

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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
          tiles(packed_size() <= FLOATS_OF_HEAD ? 1 : fitting_tiles()) {}

    int64_t padded_dim() const { return panel * panels; }
    int64_t k_size() const { return pieces * piece_size; }
    int64_t packed_size() const {
        return ceil_divide(k_size() + pieces * PIECE_ELEMENTS * padded_dim(), LANES) * LANES;
    }

    const int64_t q_elements, pieces, piece_size;
    const int64_t panel, panels;  // dimensions of a panel, panels of a head
    const int64_t tiles;          // that go through K and V together

private:
    // High panels, for few loads, but not with much padding.
    static int64_t panel_of(int64_t dim) {
        int64_t best = 1, least = 3 * dim;
        for (int64_t rows = 2; rows <= MOST_ROWS; ++rows) {
            const int64_t cost = ceil_divide(dim, rows) * (rows + 2);
            if (cost <= least) best = rows, least = cost;
        }
        return best;
    }

    int64_t fitting_tiles() const {
        const int64_t fitting = FLOATS_OF_TILES / ((q_elements + padded_dim()) * TILE);
        return fitting < 1 ? 1 : smaller(fitting, MOST_TILES);
    }
};

// What is known of the softmax of a tile; scores are q k, not yet scaled.
struct State {
    float reference[TILE];  // the score whose probability is 1
    float limit[TILE];      // of scores, for this reference
    float most[TILE];       // of the scores of the latest piece
    float sum[TILE];        // of the probabilities that are not in `total` yet
    float total[TILE];
};

// What all scores have in common.
struct Scaling {
    explicit Scaling(float scale)
        : factor(std::fabs(scale) * 1.44269504088896341f), growth(GROWTH / factor), least(-126.0f / factor) {}

    const float factor;  // to powers of 2
    const float growth;  // GROWTH as a score
    const float least;   // 2^-126 is the probability of this score
};

// Elements of the second product, from what as many keys as an element has score above the reference.
VPD_INLINE F16 probabilities(Single, const F16* above, const Scaling& scaling) {
    return exp2_of_nonpositive(multiply(broadcast(scaling.factor), above[0]));  // GROWTH is as good
}

#if defined(__AVX512BF16__)
// The upper half is 2^(factor * above), rounded to bfloat16: 2^x = 2^n * 2^f with n = floor(x), and 2^f a polynomial of
// degree 3 on [0, 1] (minimax in the relative error, 7.5e-5, where the rounding has 2e-3) with half a unit added.
// Whatever is below 2^-126 is about that. NaN stays NaN.
VPD_INLINE F16 rounded_exp2(F16 above, const Scaling& scaling) {
    const F16 factor = broadcast(scaling.factor), magic = broadcast(12582912.0f);  // 1.5 * 2^23: no bits for a fraction
    above = max(broadcast(scaling.least), above);
    const F16 shifted = _mm512_fmadd_round_ps(above, factor, magic, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const F16 f = _mm512_fmsub_ps(above, factor, subtract(shifted, magic));
    F16 p = broadcast(0.078024589f);
    p = multiply_add(p, f, broadcast(0.22606723f));
    p = multiply_add(p, f, broadcast(0.69583338f));
    p = multiply_add(p, f, broadcast(0.99992520f + 0.00390625f));
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

VPD_INLINE F16 probabilities(Pair, const F16* above, const Scaling& scaling) {
    return join_upper_halves(rounded_exp2(above[0], scaling), rounded_exp2(above[1], scaling));
}
#endif

// c[ROWS][query] (+)= a[element][ROWS] * b[element][query]. Sums are added up when they are complete: the roundings of
// thousands of terms in one sum would add up, too.
template <typename E, int ROWS>
void add_product(const float* a, const float* b, int64_t size, float* c, bool add_to_c = true) {
    F16 sum[ROWS][COLUMNS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j) sum[r][j] = broadcast(0.0f);
    accumulate<E>(Factors{a, 1, ROWS}, b, size, TILE, sum);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j) {
            float* to = c + r * TILE + j * LANES;
            store(to, add_to_c ? add(load(to), sum[r][j]) : sum[r][j]);
        }
}

// add_product for a number of rows known at run time only.
template <typename E, int ROWS = MOST_ROWS>
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
    const int64_t parts = ceil_divide(q_elements, MOST_ELEMENTS), size = ceil_divide(q_elements, parts);
    for (int64_t part = 0; part + 1 < parts; ++part, k += size * KEYS, q += size * TILE)
        add_product<E, KEYS>(k, q, size, earlier, part > 0);
    const int64_t rest = q_elements - (parts - 1) * size;
    const float* weights = k + rest * KEYS;
    F16 scores[KEYS][COLUMNS];
#pragma GCC unroll 16
    for (int r = 0; r < KEYS; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < COLUMNS; ++j) scores[r][j] = broadcast(0.0f);
    accumulate<E>(Factors{k, 1, KEYS}, q, rest, TILE, scores);
    if (parts > 1) {
#pragma GCC unroll 16
        for (int r = 0; r < KEYS; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < COLUMNS; ++j) scores[r][j] = add(scores[r][j], load(earlier + r * TILE + j * LANES));
    }
    uint32_t too_large = 0;
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) {
        F16 most = scores[0][j];
#pragma GCC unroll 16
        for (int r = 1; r < KEYS; ++r) most = max(scores[r][j], most);
        if (first) {
            store(state.reference + j * LANES, most);
            store(state.limit + j * LANES, add(most, broadcast(scaling.growth)));
        } else {
            store(state.most + j * LANES, most);
            too_large |= bits(greater(most, load(state.limit + j * LANES)));
        }
    }
    if (too_large) return false;
#pragma GCC unroll 2
    for (int j = 0; j < COLUMNS; ++j) {
        const F16 reference = load(state.reference + j * LANES);
        F16 sum = broadcast(0.0f);
#pragma GCC unroll 16
        for (int r = 0; r < KEYS; r += E::WIDTH) {
            F16 above[E::WIDTH];
#pragma GCC unroll 2
            for (int w = 0; w < E::WIDTH; ++w) above[w] = subtract(scores[r + w][j], reference);
            const F16 element = probabilities(E{}, above, scaling);
            store(p + r / E::WIDTH * TILE + j * LANES, element);
            sum = E::multiply_add(element, broadcast(weights[r / E::WIDTH]), sum);
        }
        store(state.sum + j * LANES, add(load(state.sum + j * LANES), sum));
    }
    return true;
}

// A few tiles of queries of one head after the other.
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
            start(tiles_[t], q + (first + t * TILE) * plan_.q_stride[1], smaller(count - t * TILE, TILE));
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
            finish(tiles_[t], out + (first + t * TILE) * plan_.out_stride[1], smaller(count - t * TILE, TILE));
    }

private:
    struct Tile {
        float *q, *out;  // [element][query], [dimension][query]
        State state;
    };

    void start(Tile& tile, const T* queries, int64_t count) {
        load_columns<E>(queries, plan_.q_stride[1], count, plan_.dim, tile.q, TILE);
        for (int64_t i = 0; i < layout_.q_elements && count < TILE; ++i)
            for (int64_t r = count; r < TILE; ++r) tile.q[i * TILE + r] = 0.0f;
        // A negative scale becomes a sign of q, so that the largest score stays the largest.
        if (plan_.scale < 0) flip_signs<E>(tile.q, layout_.q_elements * TILE);
        std::memset(tile.out, 0, static_cast<size_t>(layout_.padded_dim() * TILE) * sizeof(float));
        std::memset(&tile.state, 0, sizeof tile.state);
    }

    void add_block(Tile& tile, const float* k, const float* v, int64_t pieces, bool first) {
        const int64_t size = pieces * L::PIECE_ELEMENTS;
        int64_t done = 0;  // elements of p_ that are in tile.out already
        for (int64_t piece = 0; piece < pieces; ++piece, k += layout_.piece_size) {
            const int64_t here = piece * L::PIECE_ELEMENTS;
            if (probabilities_fit(tile, k, here, first && piece == 0)) continue;
            add_products(tile, v, size, done, here);
            done = here;
            raise_references(tile);
            probabilities_fit(tile, k, here, false);
        }
        add_products(tile, v, size, done, size);
    }

    bool probabilities_fit(Tile& tile, const float* k, int64_t here, bool first) {
        return find_probabilities<E>(k, tile.q, layout_.q_elements, scaling_, first, tile.state, p_ + here * TILE);
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
            const F16 most = load(state.most + column), limit = load(state.limit + column);
            const F16 before = load(state.reference + column), after = select(greater(most, limit), most, before);
            store(state.reference + column, after);
            store(state.limit + column, add(after, broadcast(scaling_.growth)));
            const F16 change = exp2_of_nonpositive(multiply(broadcast(scaling_.factor), subtract(before, after)));
            store(state.total + column, multiply(change, load(state.total + column)));
            for (int64_t i = column; i < layout_.padded_dim() * TILE; i += TILE)
                store(tile.out + i, multiply(change, load(tile.out + i)));
        }
    }

    void finish(Tile& tile, T* to, int64_t count) {
        for (int64_t column = 0; column < TILE; column += LANES) {
            const F16 inverse = divide(broadcast(1.0f), load(tile.state.total + column));
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
    Tile tiles_[MOST_TILES];
};

// 1 for each key of an element that is there; `left` keys are, from its first on.
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
                const int64_t key = i * E::WIDTH, there = key < plan.tokens ? dims : 0;
                // A whole vector, where it fits: what is too much is overwritten by the next elements.
                const int64_t size = there && d + LANES <= plan.dim ? LANES : there;
                const T* row = v + key * plan.v_stride[1] + d;
                load_row<E>(row, key + 1 < plan.tokens ? row + plan.v_stride[1] : nullptr, size, to);
                for (int64_t c = there; c < layout.panel; ++c) to[c] = 0.0f;
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
    return plan.bf16 ? Worker<Bf16, uint16_t>::sizes(plan) : Worker<Single, float>::sizes(plan);
}

void self_attention_pack(const SelfAttentionPlan& plan, float* packed, int64_t first, int64_t last) {
    plan.bf16 ? pack<Bf16, uint16_t>(plan, packed, first, last) : pack<Single, float>(plan, packed, first, last);
}

void self_attention_run(const SelfAttentionPlan& plan, const float* packed, int64_t first, int64_t last,
                        float* scratch) {
    plan.bf16 ? work<Bf16, uint16_t>(plan, packed, first, last, scratch)
              : work<Single, float>(plan, packed, first, last, scratch);
}

}  // namespace vpd::VPD_ISA
