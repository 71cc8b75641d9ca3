// Bindings of linear and conv2d, which are one GEMM with rows of different origin, and its division among threads.
#include "cpu/gemm.h"

#include "bindings/cpu/gemm_arguments.h"

namespace vpd {
namespace {

constexpr int64_t MAX_BLOCK_FLOATS = 256 << 10;  // of rows of A: about what the second cache level holds
constexpr int64_t MAX_SHARED_ROWS = 384;         // per thread; with more, every thread has its own block of rows

// Calls make_rows(first, count, a, scratch), then gemm_panels. With many rows each thread computes blocks of rows. With
// few, all threads first make the rows together and then divide the panels of the weight, each of which is read once.
template <typename MakeRows>
void run_gemm(const GemmPlan& plan, Isa isa, int64_t threads, MakeRows make_rows) {
    const int64_t rows = plan.images * plan.rows, row_floats = plan.row_floats, panels = plan.panels;
    const int64_t fits = MAX_BLOCK_FLOATS / row_floats / 12 * 12;
    const int64_t block = std::max<int64_t>(12, std::min(fits, MAX_BLOCK_ROWS));
    const int64_t blocks = ceil_divide(rows, block);
    const int64_t scratch_floats = padded(plan.k + 2 * LANES);
    threads = std::max<int64_t>(threads, 1);

    if (rows <= MAX_SHARED_ROWS * threads) {
        const auto a = allocate(rows * row_floats);
        in_parts(rows, threads, scratch_floats, [&](int64_t first, int64_t last, float* scratch) {
            make_rows(first, last - first, a.get() + first * row_floats, scratch);
        });
        // With fewer panels than threads rows are shared as well. Items are (rows, panel).
        const int64_t groups = std::min(rows, ceil_divide(2 * threads, panels));
        in_parts(groups * panels, threads, [&](int64_t first, int64_t last, int64_t) {
            for (int64_t group = first / panels; group * panels < last; ++group) {
                const int64_t begin = rows * group / groups, count = rows * (group + 1) / groups - begin;
                VPD_DISPATCH(isa, gemm_panels, plan, a.get() + begin * row_floats, begin, count,
                             std::max(first - group * panels, int64_t{0}), std::min(last - group * panels, panels));
            }
        });
        return;
    }
    in_parts(blocks, threads, scratch_floats + block * row_floats, [&](int64_t first, int64_t last, float* scratch) {
        float* block_rows = scratch + scratch_floats;
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = rows * i / blocks, count = rows * (i + 1) / blocks - begin;
            make_rows(begin, count, block_rows, scratch);
            VPD_DISPATCH(isa, gemm_panels, plan, block_rows, begin, count, 0, panels);
        }
    });
}

void linear(const Gemm& gemm, const std::array<int64_t, 2>& shape, bool norm, float eps, int threads,
            const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    const LinearPlan plan{make_gemm(gemm, shape[0], shape[1]), norm, eps};
    run_unlocked([=] {
        run_gemm(plan, isa, threads, [&](int64_t first, int64_t count, float* a, float* scratch) {
            VPD_DISPATCH(isa, linear_rows, plan, first, count, a, scratch);
        });
    });
}

void conv2d(const Gemm& gemm, const std::array<int64_t, 5>& shape, const std::array<int64_t, 5>& geometry, int threads,
            const std::string& isa_name) {
    const Isa isa = resolve_isa(isa_name);
    const auto& [images, height, width, out_height, out_width] = shape;
    const auto& [kernel_h, kernel_w, stride, top, left] = geometry;
    require(height > 0 && width > 0 && out_height > 0 && out_width > 0, "sizes must be positive");
    require(kernel_h > 0 && kernel_w > 0 && stride > 0, "kernel and stride must be positive");
    const Conv2dPlan plan{make_gemm(gemm, images, out_height * out_width, kernel_h * kernel_w),
                          height,
                          width,
                          out_width,
                          kernel_h,
                          kernel_w,
                          stride,
                          top,
                          left};
    run_unlocked([=] {
        run_gemm(plan, isa, threads, [&](int64_t first, int64_t count, float* a, float* scratch) {
            VPD_DISPATCH(isa, conv2d_rows, plan, first, count, a, scratch);
        });
    });
}

}  // namespace

void bind_gemm(py::module_& m) {
    m.def("linear", &linear, py::arg("gemm"), py::arg("shape"), py::arg("norm"), py::arg("eps"), py::arg("threads"),
          py::arg("isa") = "",
          "gemm: (x, x2, ((data, scales, sums), dtype, n, k), vectors, silu, activation, residual, out), as\n"
          "bindings/cpu/gemm_arguments.h says; shape: (images, rows).");
    m.def("conv2d", &conv2d, py::arg("gemm"), py::arg("shape"), py::arg("geometry"), py::arg("threads"),
          py::arg("isa") = "",
          "gemm: as in linear; shape: (images, height, width, height and width of out); geometry: (kernel height and\n"
          "width, stride, padding at the top and left).");
}

}  // namespace vpd
