// Instruction set levels. Files in csrc/cpu/ are compiled once per level into the namespace vpd::<level>; the level
// that runs is chosen here from what the machine and its operating system support.
#pragma once

#include <string>
#include <vector>

namespace vpd {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// Levels that were compiled in and that this machine can run, slowest first.
std::vector<Isa> usable_isas();

// The level that runs for a requested name; "" means the fastest usable one. Throws std::invalid_argument, saying
// what is possible, for a name that is unknown, was not compiled in, or is not supported by this machine.
Isa resolve_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace vpd

// Calls vpd::<level>::FUNCTION(...) for a run-time level.
#if defined(VPD_HAVE_AVX512)
#define VPD_DISPATCH(ISA, FUNCTION, ...)                                          \
    ((ISA) == ::vpd::Isa::avx512_bf16 ? ::vpd::avx512_bf16::FUNCTION(__VA_ARGS__) \
     : (ISA) == ::vpd::Isa::avx512    ? ::vpd::avx512::FUNCTION(__VA_ARGS__)      \
     : (ISA) == ::vpd::Isa::avx2      ? ::vpd::avx2::FUNCTION(__VA_ARGS__)        \
                                      : ::vpd::baseline::FUNCTION(__VA_ARGS__))
#elif defined(VPD_HAVE_AVX2)
#define VPD_DISPATCH(ISA, FUNCTION, ...) \
    ((ISA) == ::vpd::Isa::avx2 ? ::vpd::avx2::FUNCTION(__VA_ARGS__) : ::vpd::baseline::FUNCTION(__VA_ARGS__))
#else
#define VPD_DISPATCH(ISA, FUNCTION, ...) ((void)(ISA), ::vpd::baseline::FUNCTION(__VA_ARGS__))
#endif

// Declares a function of csrc/cpu/ once per level.
#define VPD_DECLARE_PER_ISA(...) \
    namespace vpd::baseline {    \
    __VA_ARGS__;                 \
    }                            \
    namespace vpd::avx2 {        \
    __VA_ARGS__;                 \
    }                            \
    namespace vpd::avx512 {      \
    __VA_ARGS__;                 \
    }                            \
    namespace vpd::avx512_bf16 { \
    __VA_ARGS__;                 \
    }
