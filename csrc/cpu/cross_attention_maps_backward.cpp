// Backward of attention with averaged maps: five small matrix products per head and tile of queries.
#include <cmath>
#include <cstring>

#include "cpu/attention_tile.h"

namespace vpd::VPD_ISA {
namespace {

constexpr int64_t TILE = BACKWARD_TILE_QUERIES;

class ChunkWorker {
public:
    ChunkWorker(const CrossAttentionMapsBackwardPlan& plan, float* memory) : plan_(plan) {
        probabilities_ = memory;
        grad_scores_ = probabilities_ + plan.tokens * TILE;
        columns_ = grad_scores_ + plan.tokens * TILE;
        q_rows_ = columns_ + plan.dim * TILE;
        grad_rows_ = q_rows_ + TILE * plan.padded_dim;
        grad_maps_ = grad_rows_ + TILE * plan.padded_dim;
    }

    void run(int64_t item, float* partial) {
        const int64_t context = item / plan_.chunks / plan_.heads, chunk = item % plan_.chunks;
        head_ = item / plan_.chunks % plan_.heads;
        context_ = context;
        grad_k_ = partial;
        grad_v_ = partial + plan_.tokens * plan_.padded_dim;
        // The images of a context, one after the other.
        const int64_t images = plan_.contexts == 1 ? plan_.batch : 1, tiles = images * plan_.tiles;
        const int64_t first = tiles * chunk / plan_.chunks, last = tiles * (chunk + 1) / plan_.chunks;
        if (!plan_.grad_out) clear(grad_v_, plan_.tokens * plan_.padded_dim);
        for (int64_t tile = first; tile < last; ++tile) {
            image_ = (plan_.contexts == 1 ? 0 : context) + tile / plan_.tiles;
            first_query_ = tile % plan_.tiles * TILE;
            run_tile(tile > first);
        }
    }

private:
    // add: to grad_k_ and grad_v_, which the chunk's first tile writes.
    void run_tile(bool add) {
        count_ = plan_.queries - first_query_ < TILE ? plan_.queries - first_query_ : TILE;
        find_probabilities();
        find_grad_scores(add);
        const LeftOperand scores{grad_scores_, TILE, 1};
        multiply<F32>(plan_.tokens, scores, q_rows_, TILE, grad_k_, plan_.padded_dim, add);
        const LeftOperand k_columns{k(), 1, plan_.k_stride[1]};
        multiply<F32>(plan_.dim, k_columns, grad_scores_, plan_.tokens, columns_, TILE);
        const int64_t stride = plan_.heads * plan_.dim;
        transpose(columns_, TILE, plan_.dim, count_,
                  plan_.dq + (image_ * plan_.queries + first_query_) * stride + head_ * plan_.dim, stride);
    }

    const float* k() const {
        return static_cast<const float*>(plan_.k) + context_ * plan_.k_stride[0] + head_ * plan_.dim;
    }
    const float* v() const {
        return static_cast<const float*>(plan_.v) + context_ * plan_.v_stride[0] + head_ * plan_.dim;
    }

    static void clear(float* memory, int64_t size) {
        std::memset(memory, 0, static_cast<size_t>(size) * sizeof(float));
    }

    // rows[TILE][padded_dim] and columns_[dim][TILE] of the tile's queries; zero beyond the last query.
    void load_rows(const float* from, const int64_t* stride, float* rows) {
        from += image_ * stride[0] + first_query_ * stride[1] + head_ * plan_.dim;
        clear(rows, TILE * plan_.padded_dim);
        for (int64_t r = 0; r < count_; ++r)
            std::memcpy(rows + r * plan_.padded_dim, from + r * stride[1],
                        static_cast<size_t>(plan_.dim) * sizeof(float));
        transpose(rows, plan_.padded_dim, TILE, plan_.dim, columns_, TILE);
    }

    void find_probabilities() {
        load_rows(static_cast<const float*>(plan_.q), plan_.q_stride, q_rows_);
        if (plan_.scale < 0)  // so that the largest score stays the largest
            for (int64_t i = 0; i < plan_.dim * TILE; i += LANES)
                store(columns_ + i, subtract(broadcast(0.0f), load(columns_ + i)));
        const LeftOperand k_rows{k(), plan_.k_stride[1], 1};
        multiply<F32>(plan_.tokens, k_rows, columns_, plan_.dim, probabilities_, TILE);
        const f32x16 factor = broadcast(std::fabs(plan_.scale) * 1.44269504088896341f);  // log2(e)
        for (int64_t column = 0; column < TILE; column += LANES) {
            float* p = probabilities_ + column;
            const f32x16 inverse = exponentiate(p, TILE, plan_.tokens, factor);
            for (int64_t l = 0; l < plan_.tokens; ++l)
                store(p + l * TILE, VPD_ISA::multiply(load(p + l * TILE), inverse));
        }
    }

    // dS = scale * P (dP - rowsum(P dP)); on the way dV += P^T dO.
    void find_grad_scores(bool add) {
        if (plan_.grad_out) {
            load_rows(plan_.grad_out, plan_.out_stride, grad_rows_);
            const LeftOperand p{probabilities_, TILE, 1}, v_rows{v(), plan_.v_stride[1], 1};
            multiply<F32>(plan_.tokens, p, grad_rows_, TILE, grad_v_, plan_.padded_dim, add);
            multiply<F32>(plan_.tokens, v_rows, columns_, plan_.dim, grad_scores_, TILE);
        } else {
            clear(grad_scores_, plan_.tokens * TILE);
        }
        if (plan_.grad_maps) add_grad_maps();
        for (int64_t column = 0; column < TILE; column += LANES) {
            f32x16 delta = broadcast(0.0f);
            for (int64_t i = column; i < plan_.tokens * TILE; i += TILE)
                delta = multiply_add(load(probabilities_ + i), load(grad_scores_ + i), delta);
            for (int64_t i = column; i < plan_.tokens * TILE; i += TILE) {
                const f32x16 p = VPD_ISA::multiply(broadcast(plan_.scale), load(probabilities_ + i));
                store(grad_scores_ + i, VPD_ISA::multiply(p, subtract(load(grad_scores_ + i), delta)));
            }
        }
    }

    void add_grad_maps() {
        const int64_t* step = plan_.maps_stride;
        const float* from = plan_.grad_maps + image_ * step[0] + head_ * step[1] + first_query_ * step[2];
        clear(grad_maps_, plan_.n_maps * TILE);
        if (step[3] == 1)
            transpose(from, step[2], count_, plan_.n_maps, grad_maps_, TILE);
        else
            for (int64_t m = 0; m < plan_.n_maps; ++m)
                for (int64_t r = 0; r < count_; ++r) grad_maps_[m * TILE + r] = from[r * step[2] + m * step[3]];
        for (int64_t l = 0; l < plan_.tokens; ++l) {
            const int64_t m = plan_.category_ids ? plan_.category_ids[l] : l;
            if (m < 0) continue;
            const f32x16 factor =
                broadcast(plan_.category_ids ? plan_.weight * plan_.category_weights[m] : plan_.weight);
            for (int64_t i = 0; i < TILE; i += LANES) {
                float* to = grad_scores_ + l * TILE + i;
                store(to, multiply_add(factor, load(grad_maps_ + m * TILE + i), load(to)));
            }
        }
    }

    const CrossAttentionMapsBackwardPlan& plan_;
    // [token][query] twice, [dim][query], [query][padded_dim] twice, [map][query].
    float *probabilities_, *grad_scores_, *columns_, *q_rows_, *grad_rows_, *grad_maps_;
    float *grad_k_ = nullptr, *grad_v_ = nullptr;  // [token][padded_dim]
    int64_t context_ = 0, head_ = 0, image_ = 0, first_query_ = 0, count_ = 0;
};

}  // namespace

void cross_attention_maps_backward_chunks(const CrossAttentionMapsBackwardPlan& plan, float* partial, int64_t first,
                                          int64_t last, float* scratch) {
    ChunkWorker worker(plan, scratch);
    for (int64_t item = first; item < last; ++item)
        worker.run(item, partial + item * 2 * plan.tokens * plan.padded_dim);
}

void cross_attention_maps_backward_sum(const CrossAttentionMapsBackwardPlan& plan, const float* partial, int64_t first,
                                       int64_t last) {
    const int64_t size = plan.tokens * plan.padded_dim, stride = plan.heads * plan.dim;
    for (int64_t item = first; item < last; ++item) {
        const int64_t context = item / plan.heads, head = item % plan.heads;
        for (int which = 0; which < 2; ++which)
            for (int64_t l = 0; l < plan.tokens; ++l) {
                float* to = (which ? plan.dv : plan.dk) + (context * plan.tokens + l) * stride + head * plan.dim;
                const float* from = partial + (item * plan.chunks * 2 + which) * size + l * plan.padded_dim;
                for (int64_t d = 0; d < plan.dim; ++d) to[d] = from[d];
                for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
                    for (int64_t d = 0; d < plan.dim; ++d) to[d] += from[chunk * 2 * size + d];
            }
    }
}

}  // namespace vpd::VPD_ISA
