// What the driver (linear.cpp) and the kernels (linear_kernel.cpp, compiled once per instruction
// set) share. A "column" is a column of the output: one row of the weight.
#ifndef LWZ_LINEAR_KERNEL_H
#define LWZ_LINEAR_KERNEL_H

#include "linear.h"

constexpr int64_t kDepthStep = 8;
// The sums over k run in blocks of equal size, at most this long, that are added in order; twice as
// long where pairs of bf16 are multiplied.
constexpr int64_t kMaxBlockDepth = 64;

struct LwzLinear : LwzLinearCall {
    // [num_vecs, depth, lanes]: the input transposed in groups of `lanes` rows, zeros after the
    // last row. [num_vecs, depth / 2, lanes] of pairs where pairs of bf16 are multiplied.
    float* packed_x;
    int64_t num_vecs;
};

// `accumulate` works on columns [begin, end) into acc: [end - begin, num_vecs * lanes]; it brings
// the weights of column `ahead` and of those behind it into the cache for the next call.
struct LwzLinearKernel {
    int lanes;
    void (*pack)(const LwzLinear& linear, int64_t vec);
    void (*accumulate)(const LwzLinear& linear, int64_t begin, int64_t end, int64_t ahead,
                       float* acc);
    void (*write)(const LwzLinear& linear, int64_t begin, int64_t end, const float* acc);
};

LwzLinearKernel lwz_linear_generic();
#if defined(LWZ_HAVE_X86_LEVELS)
LwzLinearKernel lwz_linear_avx2();
LwzLinearKernel lwz_linear_avx512();
LwzLinearKernel lwz_linear_avx512_bf16();
#endif

#endif  // LWZ_LINEAR_KERNEL_H
