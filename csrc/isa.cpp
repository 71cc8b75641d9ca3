#include "isa.h"

#include <stdexcept>

namespace vpd {
namespace {

bool machine_supports(Isa isa) {
    if (isa == Isa::baseline) return true;
#if defined(VPD_HAVE_AVX2)
    // These builtins read cpuid and also ask (xgetbv) whether the operating system saves the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2) return avx2;
#endif
#if defined(VPD_HAVE_AVX512)
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx512) return avx512;
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512_bf16: return "avx512_bf16";
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "baseline";
    }
}

std::vector<Isa> usable_isas() {
    std::vector<Isa> usable;
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
        if (machine_supports(isa)) usable.push_back(isa);
    return usable;
}

Isa resolve_isa(const std::string& name) {
    const std::vector<Isa> usable = usable_isas();
    if (name.empty()) return usable.back();
    std::string names;
    for (Isa isa : usable) {
        if (name == isa_name(isa)) return isa;
        names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
    }
    throw std::invalid_argument("instruction set '" + name + "' is unknown, not compiled in, or not supported by " +
                                "this machine; usable here: " + names);
}

}  // namespace vpd
