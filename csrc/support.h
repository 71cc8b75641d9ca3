// What the bindings share: argument checks, scratch memory, and parts of work for threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

namespace vpd {

constexpr int64_t LANES = 16;  // of a vector, see cpu/simd.h

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};

// Aligned to 64 bytes, not initialised.
inline std::unique_ptr<float[], Free> allocate(int64_t floats) {
    const size_t bytes = static_cast<size_t>(padded(floats)) * sizeof(float);
    float* memory = static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!memory) throw std::bad_alloc();
    return std::unique_ptr<float[], Free>(memory);
}

// Calls function(first, last, part) for about equal parts of `items`, one per thread.
template <typename Function>
void in_parts(int64_t items, int64_t threads, Function function) {
    const int64_t parts = std::max<int64_t>(1, std::min(threads, items));
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) function(items * part / parts, items * (part + 1) / parts, part);
}

}  // namespace vpd
