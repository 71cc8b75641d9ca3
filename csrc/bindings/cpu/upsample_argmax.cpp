// Binding of upsample_argmax: checks sizes, groups output rows and columns, and shares the row groups among threads.
#include "cpu/upsample_argmax.h"

#include <pybind11/numpy.h>

#include "bindings/cpu/support.h"

namespace vpd {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// One sparse matrix in compressed rows: row i has columns[offsets[i] .. offsets[i + 1]), ascending, with their weights.
struct ResamplingWeights {
    int64_t rows;
    const int64_t* offsets;
    const int32_t* columns;
    const float* weights;

    ResamplingWeights(const Array<int64_t>& offsets_, const Array<int32_t>& columns_, const Array<float>& weights_,
                      int64_t sources)
        : rows(offsets_.size() - 1), offsets(offsets_.data()), columns(columns_.data()), weights(weights_.data()) {
        require(rows >= 0 && columns_.size() == weights_.size(), "taps: arrays do not fit together");
        require(offsets[0] == 0 && offsets[rows] == columns_.size(), "taps: offsets do not cover the taps");
        for (int64_t i = 0; i < rows; ++i) {
            require(count(i) >= 1 && count(i) <= MAX_TAPS, "taps: every row must have 1 to 64 taps");
            float sum = 0;
            for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t) {
                require(columns[t] >= 0 && columns[t] < sources, "taps: index out of range");
                require(t == offsets[i] || columns[t - 1] < columns[t], "taps: indices must ascend");
                require(weights[t] > 0, "taps: weights must be positive");
                sum += weights[t];
            }
            // The kernel discards channels on the ground that results lie between the points they are made of.
            require(sum > 1 - 1e-5f && sum < 1 + 1e-5f, "taps: the weights of a row must add up to 1");
        }
    }

    int64_t count(int64_t row) const { return offsets[row + 1] - offsets[row]; }

    bool same_columns(int64_t a, int64_t b) const {
        return count(a) == count(b) && std::equal(columns + offsets[a], columns + offsets[a + 1], columns + offsets[b]);
    }
};

std::vector<RowGroup> make_groups(const ResamplingWeights& taps) {
    std::vector<RowGroup> groups;
    for (int64_t y = 0; y < taps.rows; ++y) {
        if (!groups.empty() && taps.same_columns(groups.back().first, y))
            ++groups.back().count;
        else
            groups.push_back({y, 1, taps.columns + taps.offsets[y], taps.weights + taps.offsets[y], taps.count(y)});
    }
    return groups;
}

struct Tiles {
    std::vector<Tile> tiles;
    std::vector<std::vector<int32_t>> sources;  // what the tiles point to
    std::vector<std::vector<float>> weights;
};

Tiles make_tiles(const ResamplingWeights& taps) {
    Tiles result;
    for (int64_t first = 0, end; first < taps.rows; first = end) {
        std::vector<int32_t> sources(taps.columns + taps.offsets[first], taps.columns + taps.offsets[first + 1]);
        // A wider tile uses the lanes better, but reads more points and rules out fewer channels.
        const size_t limit = std::max<size_t>(4, 2 * sources.size());
        for (end = first + 1; end < taps.rows && end < first + LANES; ++end) {
            std::vector<int32_t> both;
            std::set_union(sources.begin(), sources.end(), taps.columns + taps.offsets[end],
                           taps.columns + taps.offsets[end + 1], std::back_inserter(both));
            if (both.size() > limit) break;
            sources = std::move(both);
        }
        std::vector<float> weights(sources.size() * LANES, 0.0f);
        for (int64_t x = first; x < end; ++x)
            for (int64_t t = taps.offsets[x]; t < taps.offsets[x + 1]; ++t) {
                const auto point = std::lower_bound(sources.begin(), sources.end(), taps.columns[t]) - sources.begin();
                weights[point * LANES + (x - first)] = taps.weights[t];
            }
        result.tiles.push_back(
            {first, end - first, sources.data(), weights.data(), static_cast<int64_t>(sources.size())});
        result.sources.push_back(std::move(sources));  // moving keeps the addresses
        result.weights.push_back(std::move(weights));
    }
    return result;
}

void upsample_argmax(uintptr_t logits, const std::array<int64_t, 6>& shape, const std::array<int64_t, 5>& strides,
                     uintptr_t labels, const Array<int64_t>& row_offsets, const Array<int32_t>& row_sources,
                     const Array<float>& row_weights, const Array<int64_t>& column_offsets,
                     const Array<int32_t>& column_sources, const Array<float>& column_weights, int threads,
                     const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    UpsampleArgmaxPlan plan{};
    std::tie(plan.batch, plan.grid_y, plan.grid_x, plan.channels, plan.h, plan.w) = std::tuple_cat(shape);
    std::tie(plan.stride_batch, plan.stride_window, plan.stride_channel, plan.stride_row, plan.stride_column) =
        std::tuple_cat(strides);
    require(plan.batch >= 0 && std::all_of(shape.begin() + 1, shape.end(), [](int64_t size) { return size > 0; }),
            "all sizes but the batch must be positive");
    require(plan.channels < INT32_MAX - LANES, "too many channels");
    const ResamplingWeights rows(row_offsets, row_sources, row_weights, plan.grid_y * plan.h);
    const ResamplingWeights columns(column_offsets, column_sources, column_weights, plan.grid_x * plan.w);
    plan.out_h = rows.rows, plan.out_w = columns.rows;

    const std::vector<RowGroup> groups = make_groups(rows);
    const Tiles tiles = make_tiles(columns);
    plan.groups = groups.data(), plan.n_groups = static_cast<int64_t>(groups.size());
    plan.tiles = tiles.tiles.data(), plan.n_tiles = static_cast<int64_t>(tiles.tiles.size());
    for (const RowGroup& group : groups) plan.max_taps = std::max(plan.max_taps, group.taps);
    for (const Tile& tile : tiles.tiles) plan.max_points = std::max(plan.max_points, tile.points);

    const int64_t items = plan.batch * plan.n_groups;
    const int64_t rows_of_channels = plan.max_taps * plan.grid_x * plan.w + (plan.max_taps + 1) * plan.max_points + 3;

    py::gil_scoped_release unlocked;
    // Contiguous parts, because neighbouring row groups share packed rows.
    in_parts(items, threads, rows_of_channels * padded(plan.channels),
             [&](int64_t first, int64_t last, float* scratch) {
                 VPD_DISPATCH(isa, upsample_argmax_groups, plan, reinterpret_cast<const float*>(logits),
                              reinterpret_cast<int64_t*>(labels), first, last, scratch);
             });
}

}  // namespace

void bind_upsample_argmax(py::module_& m) {
    m.def(
        "upsample_argmax", &upsample_argmax, py::arg("logits"), py::arg("shape"), py::arg("strides"), py::arg("labels"),
        py::arg("row_offsets").noconvert(), py::arg("row_sources").noconvert(), py::arg("row_weights").noconvert(),
        py::arg("column_offsets").noconvert(), py::arg("column_sources").noconvert(),
        py::arg("column_weights").noconvert(), py::arg("threads"), py::arg("isa") = "",
        "logits: address of float32 (batch, grid_y, grid_x, channels, h, w) with strides (batch, window, channel, row,\n"
        "column) in elements, windows numbered row by row; labels: address of contiguous int64 (batch, out_h, out_w).");
}

}  // namespace vpd
