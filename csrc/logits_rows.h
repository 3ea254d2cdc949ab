// The C interface of the row passes over logits: plain C++17, called by ctypes.
//
// Conventions: `logits` x is [num_rows, num_columns] fp32, contiguous; all other inputs are
// [num_rows]; natural log. The passes work on z = softcap * tanh(logit_scale * x / softcap) /
// temperature, which without a cap (softcap = infinity) is logit_scale * x / temperature. A label
// outside [0, num_columns) belongs to another part of the vocabulary. A row's bits depend on that
// row alone: neither on the other rows nor on the number of threads.
#ifndef LWZ_LOGITS_ROWS_H
#define LWZ_LOGITS_ROWS_H

#include "interface.h"

// out [4, num_rows], overwritten: max_v z, sum_v exp(z - max), sum_v exp(z - max) (z - max), and
// z[label] or 0. A row of nothing but -inf has max -inf and sums 0.
LWZ_EXPORT int lwz_row_statistics(const float* logits, const int64_t* labels,
                                  const float* temperature, float* out, int64_t num_rows,
                                  int64_t num_columns, double logit_scale, double softcap,
                                  int level, int num_threads);

// Overwrites x with dx = (dlogprob (onehot - p) - dentropy p (log p + entropy) + dlse p) dz/dx,
// where p = exp(z - lse). `dentropy` and `dlse` are null where they are zero. A bf16 row takes the
// first half of the storage that its fp32 row had.
LWZ_EXPORT int lwz_write_dlogits(float* logits, const int64_t* labels, const float* temperature,
                                 const float* lse, const float* entropy, const float* dlogprobs,
                                 const float* dentropy, const float* dlse, int64_t num_rows,
                                 int64_t num_columns, double logit_scale, double softcap,
                                 int out_dtype, int level, int num_threads);

#endif  // LWZ_LOGITS_ROWS_H
