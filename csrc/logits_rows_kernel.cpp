// The inner loops of the row passes over logits.
//
// Compiled once per instruction set, with LWZ_LOGITS_ROWS_NAME naming the entry. A row is read from
// memory once in either pass: the statistics run over blocks that stay in the L1 cache, under a
// running maximum; the gradient takes the place of what it was computed from. Sums are fp32 along
// the chains of a block, double from there on.
#include "logits_rows_kernel.h"

#include "interface.h"
#include "simd.h"

namespace {

constexpr int64_t kBlockColumns = 2048;
constexpr int kChains = 4;  // independent sums: as many as hide the latency of the additions
constexpr int kStep = kChains * kLanes;
constexpr int kLineFloats = 64 / sizeof(float);
static_assert(kBlockColumns % kStep == 0, "a block consists of whole steps");

// Logarithms of probabilities are cut off here: exp_nonpositive gives 0 already, and the product
// of that 0 with the logarithm has to be 0 too where the logarithm is -inf.
constexpr float kLowestLog = -100.0f;

// z = inner * x, or with a soft cap: outer * tanh(inner * x).
struct Transform {
    float inner;
    float outer;
    float slope;  // dz/dx, without the factor 1 - tanh^2 of a soft cap
};

Transform transform_of(const LwzLogitsRows& rows, int64_t row) {
    const double temperature = rows.temperature[row];
    const float slope = static_cast<float>(rows.logit_scale / temperature);
    if (rows.softcap == __builtin_inf()) return {slope, 1.0f, slope};
    return {static_cast<float>(rows.logit_scale / rows.softcap),
            static_cast<float>(rows.softcap / temperature), slope};
}

struct Logits {
    VecF z;
    VecF slope;  // of the soft cap alone
};

template <bool kCapped>
LWZ_INLINE Logits transform(VecF x, const Transform& by) {
    if constexpr (!kCapped) return {rounded(x * by.inner), splat(1.0f)};
    const TanhAndSlope capped = tanh_and_slope(x * by.inner);
    return {rounded(capped.tanh * by.outer), capped.slope};
}

// What is known of the columns so far. Sums are relative to `max`.
struct Totals {
    float max;
    double sum;       // of exp(z - max)
    double weighted;  // of exp(z - max) (z - max)
};

void raise_max(Totals& totals, float max) {
    if (!(max > totals.max)) return;
    const double drop = static_cast<double>(totals.max) - static_cast<double>(max);
    totals.max = max;
    if (totals.sum == 0.0) return;  // nothing yet, and `drop` may be -inf
    const double shrink = __builtin_exp(drop);
    totals.weighted = shrink * (totals.weighted + drop * totals.sum);
    totals.sum *= shrink;
}

// Writes z of `count` columns, and -inf up to a whole number of steps. Returns the largest of them
// and `max`.
template <bool kCapped>
float fill_block(const float* x, int64_t count, const Transform& by, float max, float* z) {
    VecF maxima[kChains];
    for (VecF& chain : maxima) chain = splat(max);
    int64_t i = 0;
    for (; i < count; i += kStep) {
        const float* from = x + i;
        alignas(64) float tail[kStep];
        if (count - i < kStep) {
            // Padding repeats a column, so it cannot raise the maximum.
            for (float& padding : tail) padding = x[count - 1];
            std::memcpy(tail, from, (count - i) * sizeof(float));
            from = tail;
        }
        for (int c = 0; c < kChains; ++c) {
            const VecF value = transform<kCapped>(load(from + c * kLanes), by).z;
            maxima[c] = larger(value, maxima[c]);
            store(z + i + c * kLanes, value);
        }
    }
    for (int64_t padding = count; padding < i; ++padding) z[padding] = -__builtin_inff();
    const VecF all = larger(larger(maxima[0], maxima[1]), larger(maxima[2], maxima[3]));
    for (int lane = 0; lane < kLanes; ++lane) max = all[lane] > max ? all[lane] : max;
    return max;
}

// Adds a block whose maximum is in `totals` already; brings what lies at `ahead` into the cache.
void add_block(const float* z, int64_t count, const float* ahead, Totals& totals) {
    VecF sums[kChains] = {}, weighted[kChains] = {};
    // With nothing but -inf so far any number serves: every term is 0, and NaN stays NaN.
    const float max = totals.max == -__builtin_inff() ? 0.0f : totals.max;
    for (int64_t i = 0; i < count; i += kStep) {
        for (int line = 0; line < kStep; line += kLineFloats) __builtin_prefetch(ahead + i + line);
        for (int c = 0; c < kChains; ++c) {
            const VecF below = larger(splat(kLowestLog), load(z + i + c * kLanes) - max);
            const VecF e = exp_nonpositive(below);
            sums[c] += e;
            weighted[c] += e * below;
        }
    }
    totals.sum += sum_wide((sums[0] + sums[1]) + (sums[2] + sums[3]));
    totals.weighted += sum_wide((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
}

template <bool kCapped>
void statistics_of(const LwzLogitsRows& rows, int64_t row, float* out) {
    alignas(64) float z[kBlockColumns];
    const Transform by = transform_of(rows, row);
    const float* x = rows.logits + row * rows.num_columns;
    const int64_t label = rows.labels[row];
    float label_z = 0.0f;
    Totals totals{-__builtin_inff(), 0.0, 0.0};
    for (int64_t begin = 0; begin < rows.num_columns; begin += kBlockColumns) {
        const int64_t left = rows.num_columns - begin;
        const int64_t count = left < kBlockColumns ? left : kBlockColumns;
        raise_max(totals, fill_block<kCapped>(x + begin, count, by, totals.max, z));
        add_block(z, count, x + begin + kBlockColumns, totals);
        if (label >= begin && label < begin + count) label_z = z[label - begin];
    }
    out[row] = totals.max;
    out[rows.num_rows + row] = static_cast<float>(totals.sum);
    out[2 * rows.num_rows + row] = static_cast<float>(totals.weighted);
    out[3 * rows.num_rows + row] = label_z;
}

void statistics(const LwzLogitsRows& rows, int64_t row, float* out) {
    if (rows.softcap == __builtin_inf()) {
        statistics_of<false>(rows, row, out);
    } else {
        statistics_of<true>(rows, row, out);
    }
}

// dx of one row = p * (dp - dentropy * (log p + entropy)), and dlabel more at the label; all
// three coefficients contain dz/dx, but for a soft cap's slope.
struct RowGradient {
    Transform by;
    float lse;
    float entropy;
    float dp;
    float dentropy;
    float dlabel;
};

RowGradient row_gradient_of(const LwzLogitsRows& rows, const LwzRowGradients& gradients,
                            int64_t row) {
    const Transform by = transform_of(rows, row);
    const float dlogprob = gradients.dlogprobs[row];
    const float dlse = gradients.dlse == nullptr ? 0.0f : gradients.dlse[row];
    const float dentropy = gradients.dentropy == nullptr ? 0.0f : gradients.dentropy[row];
    return {by,
            gradients.lse[row],
            gradients.entropy[row],
            (dlse - dlogprob) * by.slope,
            dentropy * by.slope,
            dlogprob * by.slope};
}

template <bool kCapped, bool kHasEntropy>
LWZ_INLINE VecF dlogits(VecF x, const RowGradient& of, float dlabel) {
    const Logits logits = transform<kCapped>(x, of.by);
    const VecF log_p = logits.z - of.lse;
    VecF factor = splat(of.dp);
    if constexpr (kHasEntropy) {
        factor -= of.dentropy * (larger(splat(kLowestLog), log_p) + of.entropy);
    }
    return (exp_nonpositive(log_p) * factor + dlabel) * logits.slope;
}

// `out` may be the storage of `x`: what is written never lies behind what has been read.
template <bool kCapped, bool kHasEntropy, typename T>
void write_row(const float* x, int64_t num_columns, int64_t label, const RowGradient& of, T* out) {
    const bool has_label = label >= 0 && label < num_columns;
    const float label_x = has_label ? x[label] : 0.0f;
    int64_t i = 0;
    for (; i + kLanes <= num_columns; i += kLanes) {
        store(out + i, dlogits<kCapped, kHasEntropy>(load(x + i), of, 0.0f));
    }
    T narrow[kLanes];
    if (i < num_columns) {
        float tail[kLanes] = {};
        std::memcpy(tail, x + i, (num_columns - i) * sizeof(float));
        store(narrow, dlogits<kCapped, kHasEntropy>(load(tail), of, 0.0f));
        std::memcpy(out + i, narrow, (num_columns - i) * sizeof(T));
    }
    if (has_label) {
        store(narrow, dlogits<kCapped, kHasEntropy>(splat(label_x), of, of.dlabel));
        std::memcpy(out + label, narrow, sizeof(T));
    }
}

template <bool kCapped, bool kHasEntropy>
void write_dlogits_of(const LwzLogitsRows& rows, const LwzRowGradients& gradients, int64_t row) {
    const RowGradient of = row_gradient_of(rows, gradients, row);
    const int64_t begin = row * rows.num_columns;
    const float* x = rows.logits + begin;
    float* out = static_cast<float*>(gradients.dlogits) + begin;
    if (gradients.out_dtype == kLwzBFloat16) {
        write_row<kCapped, kHasEntropy>(x, rows.num_columns, rows.labels[row], of,
                                        reinterpret_cast<bf16*>(out));
    } else {
        write_row<kCapped, kHasEntropy>(x, rows.num_columns, rows.labels[row], of, out);
    }
}

void write_dlogits(const LwzLogitsRows& rows, const LwzRowGradients& gradients, int64_t row) {
    const bool is_capped = rows.softcap != __builtin_inf();
    const bool has_entropy = gradients.dentropy != nullptr;
    if (is_capped && has_entropy) {
        write_dlogits_of<true, true>(rows, gradients, row);
    } else if (is_capped) {
        write_dlogits_of<true, false>(rows, gradients, row);
    } else if (has_entropy) {
        write_dlogits_of<false, true>(rows, gradients, row);
    } else {
        write_dlogits_of<false, false>(rows, gradients, row);
    }
}

}  // namespace

LwzLogitsRowsKernel LWZ_LOGITS_ROWS_NAME() { return {statistics, write_dlogits}; }
