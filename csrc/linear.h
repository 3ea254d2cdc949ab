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

// For the library's own use: the same, with what a decoder's layer does before and behind it.

// What the rows of x go through on their way to the product.
enum LwzInput : int {
    kLwzPlain = 0,
    // x / sqrt(mean(x^2) + norm_eps) * norm_weight, rounded once to the dtype of x.
    kLwzRmsNorm = 1,
    // x is [num_rows, 2 * depth], gate then up: silu(gate) * up, each rounded to the dtype of x.
    kLwzSiluGate = 2,
};

// `norm_weight` [depth] has the dtype of x. `residual` [num_rows, num_columns] has that of `out`,
// which it may be itself, or is null; it is added to the rounded sum, which is rounded again.
struct LwzLinearCall {
    const void* x;
    const void* weight;
    const void* bias;
    void* out;
    int64_t num_rows, num_columns, depth;
    int x_dtype, weight_dtype, out_dtype, level, num_threads;
    int input = kLwzPlain;
    const void* norm_weight = nullptr;
    float norm_eps = 0.0f;
    const void* residual = nullptr;
};

int lwz_run_linear(const LwzLinearCall& call);

#endif  // LWZ_LINEAR_H
