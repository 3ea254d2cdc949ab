// The driver of the row passes over logits: checks, and threads that share out the rows.
#include "logits_rows.h"

#include "logits_rows_kernel.h"

namespace {

LwzLogitsRowsKernel kernel_of(int level) {
#if defined(LWZ_HAVE_X86_LEVELS)
    if (level == kLwzAvx512Bf16) return lwz_logits_rows_avx512_bf16();
    if (level == kLwzAvx512) return lwz_logits_rows_avx512();
    if (level == kLwzAvx2) return lwz_logits_rows_avx2();
#endif
    (void)level;
    return lwz_logits_rows_generic();
}

int check(const LwzLogitsRows& rows, int level) {
    if (level < kLwzGeneric || level > lwz_best_level()) return kLwzUnsupportedLevel;
    if (rows.num_columns < 1) return kLwzEmptyVocabulary;
    return kLwzOk;
}

template <typename Pass>
void for_each_row(const LwzLogitsRows& rows, int num_threads, const Pass& pass) {
    // Waking and joining the threads costs more than a pass over this many logits.
    constexpr int64_t kLogitsWorthThreads = 1 << 14;
    const bool is_large = rows.num_rows > 1 &&
                          rows.num_rows * rows.num_columns > kLogitsWorthThreads;
    (void)is_large;
    (void)num_threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && is_large)
#endif
    for (int64_t row = 0; row < rows.num_rows; ++row) pass(row);
}

}  // namespace

int lwz_row_statistics(const float* logits, const int64_t* labels, const float* temperature,
                       float* out, int64_t num_rows, int64_t num_columns, double logit_scale,
                       double softcap, int level, int num_threads) {
    const LwzLogitsRows rows{logits,      labels,      temperature, num_rows,
                             num_columns, logit_scale, softcap};
    if (const int status = check(rows, level)) return status;
    const LwzLogitsRowsKernel kernel = kernel_of(level);
    for_each_row(rows, num_threads, [&](int64_t row) { kernel.statistics(rows, row, out); });
    return kLwzOk;
}

int lwz_write_dlogits(float* logits, const int64_t* labels, const float* temperature,
                      const float* lse, const float* entropy, const float* dlogprobs,
                      const float* dentropy, const float* dlse, int64_t num_rows,
                      int64_t num_columns, double logit_scale, double softcap, int out_dtype,
                      int level, int num_threads) {
    const LwzLogitsRows rows{logits,      labels,      temperature, num_rows,
                             num_columns, logit_scale, softcap};
    const LwzRowGradients gradients{lse, entropy, dlogprobs, dentropy, dlse, logits, out_dtype};
    if (const int status = check(rows, level)) return status;
    const LwzLogitsRowsKernel kernel = kernel_of(level);
    for_each_row(rows, num_threads,
                 [&](int64_t row) { kernel.write_dlogits(rows, gradients, row); });
    return kLwzOk;
}
