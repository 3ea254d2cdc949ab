// The C interface of the native linear layer for few rows: plain C++17, called by ctypes.
#ifndef LWZ_LINEAR_H
#define LWZ_LINEAR_H

#include "interface.h"

// out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] with fp32 sums; all matrices are contiguous,
// `out` is overwritten, `bias` has the dtype of `weight` or is null, `depth` is the size of k: a
// multiple of 8. An element's bits depend on its own row of x and of weight only: neither on the
// other rows nor on the number of threads.
LWZ_EXPORT int lwz_linear(const void* x, const void* weight, const void* bias, void* out,
                          int64_t num_rows, int64_t num_columns, int64_t depth, int x_dtype,
                          int weight_dtype, int out_dtype, int level, int num_threads);

#endif  // LWZ_LINEAR_H
