// What the driver (adamw.cpp) and the kernels (adamw_kernel.cpp, compiled once per instruction set)
// share. adamw.h defines the mathematics.
#ifndef LWZ_ADAMW_KERNEL_H
#define LWZ_ADAMW_KERNEL_H

#include <cstdint>

struct LwzAdamw {
    void* weights;
    int16_t* lower;  // or null
    const float* grad;
    void* exp_avg;
    void* exp_avg_sq;
    float grad_scale, beta1, beta2, decay, step_size, inverse_correction, eps;
    int moment_dtype;
};

// Steps the elements [begin, end).
using LwzAdamwKernel = void (*)(const LwzAdamw& adamw, int64_t begin, int64_t end);

LwzAdamwKernel lwz_adamw_generic();
#if defined(LWZ_HAVE_X86_LEVELS)
LwzAdamwKernel lwz_adamw_avx2();
LwzAdamwKernel lwz_adamw_avx512();
LwzAdamwKernel lwz_adamw_avx512_bf16();
#endif

#endif  // LWZ_ADAMW_KERNEL_H
