// What the driver (logits_rows.cpp) and the kernels (logits_rows_kernel.cpp, compiled once per
// instruction set) share. logits_rows.h defines the mathematics.
#ifndef LWZ_LOGITS_ROWS_KERNEL_H
#define LWZ_LOGITS_ROWS_KERNEL_H

#include <cstdint>

struct LwzLogitsRows {
    const float* logits;  // [num_rows, num_columns]
    const int64_t* labels;
    const float* temperature;
    int64_t num_rows, num_columns;
    double logit_scale;
    double softcap;  // infinity: none
};

struct LwzRowGradients {
    const float* lse;
    const float* entropy;
    const float* dlogprobs;
    const float* dentropy;  // or null
    const float* dlse;      // or null
    void* dlogits;          // the storage of the logits
    int out_dtype;
};

struct LwzLogitsRowsKernel {
    void (*statistics)(const LwzLogitsRows& rows, int64_t row, float* out);
    void (*write_dlogits)(const LwzLogitsRows& rows, const LwzRowGradients& gradients,
                          int64_t row);
};

LwzLogitsRowsKernel lwz_logits_rows_generic();
#if defined(LWZ_HAVE_X86_LEVELS)
LwzLogitsRowsKernel lwz_logits_rows_avx2();
LwzLogitsRowsKernel lwz_logits_rows_avx512();
LwzLogitsRowsKernel lwz_logits_rows_avx512_bf16();
#endif

#endif  // LWZ_LOGITS_ROWS_KERNEL_H
