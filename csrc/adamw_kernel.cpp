// The inner loop of the AdamW step: limited by memory.
//
// Compiled once per instruction set, with LWZ_ADAMW_NAME naming the entry. What does not fill a
// vector goes through padded copies and the same code, so that an element's bits do not depend on
// its place.
#include "adamw_kernel.h"

#include "interface.h"
#include "simd.h"

namespace {

typedef int16_t VecI16 __attribute__((vector_size(kLanes * 2)));

LWZ_INLINE VecF square_root(VecF v) {
#if defined(__AVX512F__)
    return (VecF)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
    return (VecF)_mm256_sqrt_ps((__m256)v);
#else
    for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

LWZ_INLINE VecU widen(const VecI16& narrow) {
#if defined(__AVX512F__)
    return (VecU)_mm512_cvtepi16_epi32((__m256i)narrow);
#elif defined(__AVX2__)
    return (VecU)_mm256_cvtepi16_epi32((__m128i)narrow);
#else
    return (VecU)__builtin_convertvector(narrow, VecI);
#endif
}

LWZ_INLINE VecF read_master(const float* weights, const int16_t*) { return load(weights); }

LWZ_INLINE VecF read_master(const bf16* weights, const int16_t* lower) {
    VecI16 rest;
    std::memcpy(&rest, lower, sizeof(rest));
    return (VecF)((VecU)load(weights) + widen(rest));
}

LWZ_INLINE void write_master(float* weights, int16_t*, const VecF& master) {
    store(weights, master);
}

LWZ_INLINE void write_master(bf16* weights, int16_t* lower, const VecF& master) {
    const VecU bits = (VecU)master;
    const VecU16 upper = __builtin_convertvector((bits + 0x8000u) >> 16, VecU16);
    // bits - (upper << 16), of which 16 bits are not zero.
    const VecU16 rest = __builtin_convertvector(bits & 0xffffu, VecU16);
    std::memcpy(weights, &upper, sizeof(upper));
    std::memcpy(lower, &rest, sizeof(rest));
}

// `Weight` is float, or bf16 with lower halves.
template <typename Weight, typename Moment>
LWZ_INLINE void step(const LwzAdamw& adamw, Weight* weights, int16_t* lower, const float* grad,
                     Moment* exp_avg, Moment* exp_avg_sq) {
    const VecF g = load(grad) * adamw.grad_scale;
    VecF m = load(exp_avg), v = load(exp_avg_sq);
    m = m + (g - m) * (1.0f - adamw.beta1);
    v = v * adamw.beta2 + g * g * (1.0f - adamw.beta2);
    store(exp_avg, m);
    store(exp_avg_sq, v);
    const VecF denominator = square_root(v) * adamw.inverse_correction + adamw.eps;
    const VecF master = read_master(weights, lower) * adamw.decay;
    write_master(weights, lower, master - m * adamw.step_size / denominator);
}

template <typename Weight, typename Moment>
void step_all(const LwzAdamw& adamw, int64_t begin, int64_t end) {
    Weight* weights = static_cast<Weight*>(adamw.weights);
    Moment* exp_avg = static_cast<Moment*>(adamw.exp_avg);
    Moment* exp_avg_sq = static_cast<Moment*>(adamw.exp_avg_sq);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
        step(adamw, weights + i, adamw.lower == nullptr ? nullptr : adamw.lower + i,
             adamw.grad + i, exp_avg + i, exp_avg_sq + i);
    }
    if (i == end) return;
    const int64_t count = end - i;
    Weight last_weights[kLanes] = {};
    int16_t last_lower[kLanes] = {};
    float last_grad[kLanes] = {};
    Moment last_exp_avg[kLanes] = {}, last_exp_avg_sq[kLanes] = {};
    std::memcpy(last_weights, weights + i, count * sizeof(Weight));
    if (adamw.lower != nullptr) std::memcpy(last_lower, adamw.lower + i, count * sizeof(int16_t));
    std::memcpy(last_grad, adamw.grad + i, count * sizeof(float));
    std::memcpy(last_exp_avg, exp_avg + i, count * sizeof(Moment));
    std::memcpy(last_exp_avg_sq, exp_avg_sq + i, count * sizeof(Moment));
    step(adamw, last_weights, last_lower, last_grad, last_exp_avg, last_exp_avg_sq);
    std::memcpy(weights + i, last_weights, count * sizeof(Weight));
    if (adamw.lower != nullptr) std::memcpy(adamw.lower + i, last_lower, count * sizeof(int16_t));
    std::memcpy(exp_avg + i, last_exp_avg, count * sizeof(Moment));
    std::memcpy(exp_avg_sq + i, last_exp_avg_sq, count * sizeof(Moment));
}

void run(const LwzAdamw& adamw, int64_t begin, int64_t end) {
    const bool is_narrow = adamw.moment_dtype == kLwzBFloat16;
    if (adamw.lower == nullptr) {
        return is_narrow ? step_all<float, bf16>(adamw, begin, end)
                         : step_all<float, float>(adamw, begin, end);
    }
    return is_narrow ? step_all<bf16, bf16>(adamw, begin, end)
                     : step_all<bf16, float>(adamw, begin, end);
}

}  // namespace

LwzAdamwKernel LWZ_ADAMW_NAME() { return run; }
