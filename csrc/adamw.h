// The C interface of the native AdamW step: plain C++17, called by ctypes.
#ifndef LWZ_ADAMW_H
#define LWZ_ADAMW_H

#include "interface.h"

// One step on `size` parameters, in place on all but the gradient:
//     g = grad_scale * grad,  m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2,
//     p = decay * p - step_size * m / (sqrt(v) * inverse_correction + eps).
// Where `lower` is null, `weights` is p in fp32. Else `weights` is p rounded to bf16 with ties away
// from zero and `lower` the int16 that is missing: p's bits are (weights << 16) + lower. Both
// moments are in `moment_dtype`, rounded to nearest where that is bf16. An element's bits depend on
// its own inputs alone: neither on its place nor on the number of threads.
LWZ_EXPORT int lwz_adamw(void* weights, int16_t* lower, const float* grad, void* exp_avg,
                         void* exp_avg_sq, int64_t size, float grad_scale, float beta1, float beta2,
                         float decay, float step_size, float inverse_correction, float eps,
                         int moment_dtype, int level, int num_threads);

#endif  // LWZ_ADAMW_H
