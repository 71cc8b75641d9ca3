// Attention with averaged maps: two small matrix products per head around a softmax, all within the cache.
//
// For bfloat16 on machines with its dot product, an "element" of the matrices is a pair of bfloat16, neighbours along the
// summed dimension; elsewhere bfloat16 is widened to float32 while it is packed.
#include <cmath>
#include <cstring>

#include "cpu/attention_tile.h"

namespace vpd::VPD_ISA {
namespace {

// Rounds probabilities [token][query] to elements [pair of tokens][query], in place.
VPD_INLINE void make_elements(Bf16Element, float* p, int64_t tile, int64_t tokens) {
#if defined(__AVX512BF16__)
    for (int64_t l = 0; l < tokens; l += 2)
        for (int64_t i = 0; i < tile; i += LANES) {
            const f32x16 next = l + 1 < tokens ? load(p + (l + 1) * tile + i) : broadcast(0.0f);
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(p + l * tile + i)));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(next));
            store(p + l / 2 * tile + i, _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16))));
        }
#else
    (void)p, (void)tile, (void)tokens;
#endif
}
#if defined(__AVX512BF16__)
VPD_INLINE void make_elements(F32, float*, int64_t, int64_t) {}
#endif

// Computes one tile of queries of one image after the other.
template <typename E, typename T>
class TileWorker {
public:
    TileWorker(const CrossAttentionMapsPlan& plan, const float* packed, float* memory)
        : plan_(plan), packed_(packed), tile_(plan.tile), q_elements_(elements<E>(plan.dim)) {
        q_ = memory;
        scores_ = q_ + tile_ * plan.dim;
        sums_ = scores_ + tile_ * plan.tokens;
        out_ = sums_ + tile_ * plan.tokens;
        by_category_ = out_ + tile_ * plan.dim;
        rows_ = by_category_ + tile_ * plan.n_maps;
    }

    void run(int64_t image, int64_t first_query) {
        image_ = image, first_ = first_query;
        count_ = plan_.queries - first_query < tile_ ? plan_.queries - first_query : tile_;
        for (int64_t head = 0; head < plan_.heads; ++head) {
            load_queries<E>(queries(head), plan_.q_stride[1], count_, plan_.dim, plan_.scale, q_, tile_);
            prefetch_memory(head);
            multiply<E>(plan_.tokens, k_of(head), q_, q_elements_, scores_, tile_);
            softmax(head == 0 || !plan_.average_heads);
            multiply<E>(plan_.dim, v_of(head), scores_, elements<E>(plan_.tokens), out_, tile_);
            store_out(head);
            if (plan_.maps && !plan_.average_heads) store_maps(head);
        }
        if (plan_.maps && plan_.average_heads) store_maps(0);
    }

private:
    int64_t context() const { return plan_.contexts == 1 ? 0 : image_; }
    const float* packed(int64_t head) const { return packed_ + (context() * plan_.heads + head) * plan_.packed_size; }

    // Rows are tokens, steps along the head's dimension.
    LeftOperand k_of(int64_t head) const {
        if (plan_.packed_size) return {packed(head), q_elements_, 1};
        const float* k = static_cast<const float*>(plan_.k);
        return {k + context() * plan_.k_stride[0] + head * plan_.dim, plan_.k_stride[1], 1};
    }

    // Rows are the head's dimension, steps along the tokens.
    LeftOperand v_of(int64_t head) const {
        if (plan_.packed_size) return {packed(head) + plan_.tokens * q_elements_, 1, plan_.dim};
        const float* v = static_cast<const float*>(plan_.v);
        return {v + context() * plan_.v_stride[0] + head * plan_.dim, 1, plan_.v_stride[1]};
    }

    const T* queries(int64_t head) const {
        return static_cast<const T*>(plan_.q) + image_ * plan_.q_stride[0] + first_ * plan_.q_stride[1] +
               head * plan_.dim;
    }

    T* results(int64_t head) const {
        return static_cast<T*>(plan_.out) + ((image_ * plan_.queries + first_) * plan_.heads + head) * plan_.dim;
    }

    // Prefetches the memory of the head's results and of the next tile's queries: a head reads and writes short pieces that
    // are far apart, which the hardware does not foresee.
    void prefetch_memory(int64_t head) const {
        const int64_t stride = plan_.heads * plan_.dim, next = count_ * plan_.q_stride[1];
        const bool more = first_ + 2 * count_ <= plan_.queries;
        for (int64_t r = 0; r < count_; ++r)
            for (int64_t d = 0; d < plan_.dim; d += 64 / sizeof(T)) {
                __builtin_prefetch(results(head) + r * stride + d, 1);
                if (more) __builtin_prefetch(queries(head) + next + r * plan_.q_stride[1] + d);
            }
    }

    // Leaves the probabilities, not yet divided by their sums, in scores_, and adds their maps to sums_.
    void softmax(bool first_head) {
        const f32x16 factor = broadcast(std::fabs(plan_.scale) * 1.44269504088896341f);  // log2(e)
        const f32x16 share =
            broadcast(plan_.average_heads ? plan_.weight / static_cast<float>(plan_.heads) : plan_.weight);
        for (int64_t column = 0; column < tile_; column += LANES) {
            const f32x16 inverse = exponentiate(scores_ + column, tile_, plan_.tokens, factor);
            store(inverse_ + column, inverse);
            if (!plan_.maps) continue;
            const f32x16 each = VPD_ISA::multiply(inverse, share);
            for (int64_t i = column; i < plan_.tokens * tile_; i += tile_) {
                const f32x16 p = load(scores_ + i);
                store(sums_ + i, first_head ? VPD_ISA::multiply(each, p) : multiply_add(each, p, load(sums_ + i)));
            }
        }
        make_elements(E{}, scores_, tile_, plan_.tokens);
    }

    void store_out(int64_t head) {
        for (int64_t column = 0; column < tile_; column += LANES) {
            const f32x16 inverse = load(inverse_ + column);
            for (int64_t i = column; i < plan_.dim * tile_; i += tile_)
                store(out_ + i, VPD_ISA::multiply(load(out_ + i), inverse));
        }
        store_columns(out_, tile_, count_, plan_.dim, rows_, results(head), plan_.heads * plan_.dim);
    }

    void store_maps(int64_t head) {
        const float* values = sums_;
        if (plan_.category_ids) {
            reduce_categories();
            values = by_category_;
        }
        const int64_t *to_step = plan_.maps_stride, *add_step = plan_.addend_stride;
        float* to = plan_.maps + image_ * to_step[0] + head * to_step[1] + first_ * to_step[2];
        const float* addend = plan_.addend;
        if (addend) addend += image_ * add_step[0] + head * add_step[1] + first_ * add_step[2];
        if (to_step[3] == 1) {  // maps of a query are neighbours in memory
            transpose(values, tile_, plan_.n_maps, count_, rows_, plan_.n_maps);
            for (int64_t r = 0; r < count_; ++r, to += to_step[2])
                store_row(rows_ + r * plan_.n_maps, plan_.n_maps, to, 1, addend ? addend + r * add_step[2] : nullptr,
                          add_step[3]);
        } else {  // NCHW: queries of a map are
            for (int64_t m = 0; m < plan_.n_maps; ++m)
                store_row(values + m * tile_, count_, to + m * to_step[3], to_step[2],
                          addend ? addend + m * add_step[3] : nullptr, add_step[2]);
        }
    }

    static void store_row(const float* from, int64_t size, float* to, int64_t to_step, const float* addend,
                          int64_t addend_step) {
        if (!addend)
            for (int64_t i = 0; i < size; ++i) to[i * to_step] = from[i];
        else
            for (int64_t i = 0; i < size; ++i) to[i * to_step] = addend[i * addend_step] + from[i];
    }

    void reduce_categories() {
        std::memset(by_category_, 0, static_cast<size_t>(plan_.n_maps * tile_) * sizeof(float));
        for (int64_t l = 0; l < plan_.tokens; ++l) {
            if (plan_.category_ids[l] < 0) continue;
            float* to = by_category_ + plan_.category_ids[l] * tile_;
            for (int64_t i = 0; i < tile_; i += LANES) store(to + i, add(load(to + i), load(sums_ + l * tile_ + i)));
        }
        for (int64_t m = 0; m < plan_.n_maps; ++m)
            for (int64_t i = m * tile_; i < (m + 1) * tile_; i += LANES)
                store(by_category_ + i,
                      VPD_ISA::multiply(load(by_category_ + i), broadcast(plan_.category_weights[m])));
    }

    const CrossAttentionMapsPlan& plan_;
    const float* packed_;
    const int64_t tile_, q_elements_;  // queries of a tile, elements of a query
    // [element][query], [token][query] twice, [dim][query], [map][query], and rows of queries to be stored.
    float *q_, *scores_, *sums_, *out_, *by_category_, *rows_;
    float inverse_[MAX_TILE_QUERIES];  // one over the sum of each query
    int64_t image_ = 0, first_ = 0, count_ = 0;
};

// One row of elements: of K, along the head's dimension.
template <typename E>
VPD_INLINE void pack_k_row(const uint16_t* from, int64_t dim, float* to) {
    if (E::WIDTH == 2 && dim % 2 == 0) {  // pairs are there already
        std::memcpy(to, from, static_cast<size_t>(dim) * sizeof *from);
    } else {
        for (int64_t i = 0; i < elements<E>(dim); ++i) to[i] = element<E>(from, i, dim);
    }
}

// K as [token][element], V as [element along the tokens][dim].
template <typename E>
void pack(const CrossAttentionMapsPlan& plan, float* packed, int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
        const int64_t context = item / plan.heads, head = item % plan.heads;
        const auto* k = static_cast<const uint16_t*>(plan.k) + context * plan.k_stride[0] + head * plan.dim;
        const auto* v = static_cast<const uint16_t*>(plan.v) + context * plan.v_stride[0] + head * plan.dim;
        float* to = packed + item * plan.packed_size;
        for (int64_t l = 0; l < plan.tokens; ++l, to += elements<E>(plan.dim))
            pack_k_row<E>(k + l * plan.k_stride[1], plan.dim, to);
        for (int64_t l = 0; l < plan.tokens; l += E::WIDTH, to += plan.dim) {
            const uint16_t* row = v + l * plan.v_stride[1];
            load_row<E>(row, l + 1 < plan.tokens ? row + plan.v_stride[1] : nullptr, plan.dim, to);
        }
    }
}

template <typename E, typename T>
void work(const CrossAttentionMapsPlan& plan, const float* packed, int64_t first, int64_t last, float* scratch) {
    TileWorker<E, T> worker(plan, packed, scratch);
    for (int64_t item = first; item < last; ++item) worker.run(item / plan.tiles, item % plan.tiles * plan.tile);
}

}  // namespace

void cross_attention_maps_pack(const CrossAttentionMapsPlan& plan, float* packed, int64_t first, int64_t last) {
    pack<Bf16Element>(plan, packed, first, last);
}

void cross_attention_maps_tiles(const CrossAttentionMapsPlan& plan, const float* packed, int64_t first, int64_t last,
                                float* scratch) {
    plan.bf16 ? work<Bf16Element, uint16_t>(plan, packed, first, last, scratch)
              : work<F32, float>(plan, packed, first, last, scratch);
}

}  // namespace vpd::VPD_ISA
