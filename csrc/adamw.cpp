// The driver of the AdamW step: checks, and threads that each take one span of the parameters.
#include "adamw.h"

#include "adamw_kernel.h"

namespace {

// A cache line of the narrowest array, so that no line is written by two threads.
constexpr int64_t kSpanStep = 32;

LwzAdamwKernel kernel_of(int level) {
#if defined(LWZ_HAVE_X86_LEVELS)
    if (level == kLwzAvx512Bf16) return lwz_adamw_avx512_bf16();
    if (level == kLwzAvx512) return lwz_adamw_avx512();
    if (level == kLwzAvx2) return lwz_adamw_avx2();
#endif
    (void)level;
    return lwz_adamw_generic();
}

}  // namespace

int lwz_adamw(void* weights, int16_t* lower, const float* grad, void* exp_avg, void* exp_avg_sq,
              int64_t size, float grad_scale, float beta1, float beta2, float decay,
              float step_size, float inverse_correction, float eps, int moment_dtype, int level,
              int num_threads) {
    if (level < kLwzGeneric || level > lwz_best_level()) return kLwzUnsupportedLevel;
    const LwzAdamw adamw{weights, lower, grad,  exp_avg,   exp_avg_sq,         grad_scale,
                         beta1,   beta2, decay, step_size, inverse_correction, eps,
                         moment_dtype};
    const LwzAdamwKernel kernel = kernel_of(level);
    const int64_t num_steps = (size + kSpanStep - 1) / kSpanStep;
    const int64_t num_spans = num_threads < num_steps ? num_threads : num_steps;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(num_threads) if (num_spans > 1)
#endif
    for (int64_t i = 0; i < num_spans; ++i) {
        const int64_t begin = num_steps * i / num_spans * kSpanStep;
        const int64_t end = num_steps * (i + 1) / num_spans * kSpanStep;
        kernel(adamw, begin, end < size ? end : size);
    }
    return kLwzOk;
}
