// Scratch memory and argument checks that the bindings share.
#pragma once

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

}  // namespace vpd
