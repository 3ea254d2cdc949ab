// Versions and what this processor can run.
#include "interface.h"

int lwz_abi_version() { return kLwzAbiVersion; }

int lwz_best_level() {
#if defined(LWZ_HAVE_X86_LEVELS)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        if (__builtin_cpu_supports("avx512bf16")) return kLwzAvx512Bf16;
        return kLwzAvx512;
    }
    if (has_avx2) return kLwzAvx2;
#endif
    return kLwzGeneric;
}

int lwz_has_openmp() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}
