// One vector type for every instruction set, written with the compiler's vector extensions.
//
// The including file is compiled once per instruction set; everything here has internal linkage,
// so that code for a wide instruction set can never be picked by the linker for a narrow one.
#ifndef LWZ_SIMD_H
#define LWZ_SIMD_H

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 8;  // lowered to two 4-lane halves where the machine has no 8-lane registers
constexpr int kRegisters = 16;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));
typedef float Vec4F __attribute__((vector_size(16)));
typedef int32_t Vec4I __attribute__((vector_size(16)));

#define LWZ_INLINE static inline __attribute__((always_inline))

// A bfloat16 is the upper half of a float's bits.
struct bf16 {
    uint16_t bits;
};

LWZ_INLINE VecF splat(float x) { return x - VecF{}; }

LWZ_INLINE VecF load(const float* p) {
    VecF v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

LWZ_INLINE VecF load(const bf16* p) {
    VecU16 narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    // GCC 12 widens 8 lanes in two halves and a merge; the intrinsic is one instruction.
#if defined(__AVX512F__)
    const VecU wide = (VecU)_mm512_cvtepu16_epi32((__m256i)narrow);
#elif defined(__AVX2__)
    const VecU wide = (VecU)_mm256_cvtepu16_epi32((__m128i)narrow);
#else
    const VecU wide = __builtin_convertvector(narrow, VecU);
#endif
    return (VecF)(wide << 16);
}

LWZ_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }

LWZ_INLINE VecF select(VecI mask, VecF yes, VecF no) {
    return (VecF)(((VecI)yes & mask) | ((VecI)no & ~mask));
}

// a < b, lane by lane. GCC 12 compares 8 lanes one after the other where a register has 4.
LWZ_INLINE VecI is_less(VecF a, VecF b) {
#if defined(__AVX2__)
    return a < b;
#else
    Vec4F a_half[2], b_half[2];
    std::memcpy(a_half, &a, sizeof(a));
    std::memcpy(b_half, &b, sizeof(b));
    const Vec4I half[2] = {a_half[0] < b_half[0], a_half[1] < b_half[1]};
    VecI joined;
    std::memcpy(&joined, half, sizeof(joined));
    return joined;
#endif
}

LWZ_INLINE VecI is_number(VecF v) {
#if defined(__AVX2__)
    return v == v;
#else
    return is_less(v, splat(1.0f)) | is_less(splat(-1.0f), v);
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN.
LWZ_INLINE void store(bf16* p, VecF v) {
    const VecU bits = (VecU)v;
    const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecU kept = (VecU)select(is_number(v), (VecF)rounded, (VecF)(VecU{} + 0x7fc0));
    // GCC 12 masks, packs and permutes 8 lanes; the intrinsics are two instructions.
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i wide = (__m256i)kept;
    const VecU16 narrow = (VecU16)_mm_packus_epi32(_mm256_castsi256_si128(wide),
                                                   _mm256_extracti128_si256(wide, 1));
#else
    const VecU16 narrow = __builtin_convertvector(kept, VecU16);
#endif
    std::memcpy(p, &narrow, sizeof(narrow));
}

// The larger of each pair of lanes; b where either is NaN.
LWZ_INLINE VecF larger(VecF a, VecF b) {
    // GCC 12 makes a comparison and a blend of the plain form.
#if defined(__AVX512F__)
    return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(is_less(b, a), a, b);
#endif
}

// The value itself, rounded: keeps the compiler from fusing the multiplication that made it with
// an addition that follows.
LWZ_INLINE VecF rounded(VecF v) {
#if defined(__AVX2__)
    __asm__("" : "+v"(v));
#else
    __asm__("" : "+m"(v));
#endif
    return v;
}

// Sum of the lanes in double precision, in order.
LWZ_INLINE double sum_wide(VecF v) {
    double sum = 0.0;
    for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(v[i]);
    return sum;
}

// Sums of four vectors, in order.
LWZ_INLINE Vec4F sum_lanes(VecF a, VecF b, VecF c, VecF d) {
#if defined(__AVX512F__)
    VecF ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13,
                                      29) +
              __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15,
                                      31);
    VecF cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13,
                                      29) +
              __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15,
                                      31);
    VecF abcd = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13,
                                        28, 29) +
                __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15,
                                        30, 31);
    return (__builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) +
            __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7)) +
           (__builtin_shufflevector(abcd, abcd, 8, 9, 10, 11) +
            __builtin_shufflevector(abcd, abcd, 12, 13, 14, 15));
#else
    VecF ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
              __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    VecF cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13) +
              __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    VecF abcd = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) +
           __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7);
#endif
}

// exp(x) for x <= 0. Below the smallest normal result (x < -87.33) the value is exactly 0; NaN
// stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2, and exp(r) by its Taylor sum to r^7, whose
// remainder is below 6e-9 relative: with fp32 rounding the error stays under 2.5e-7 (tested).
LWZ_INLINE VecF exp_nonpositive(VecF x) {
    const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    VecF shifted = x * 1.44269504088896341f + magic;
    VecF n = shifted - magic;
    VecF r = x - n * 0.693145751953125f;  // ln 2 in two parts: the first product is exact
    r = r - n * 1.428606820309417232e-6f;
    VecF p = splat(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // The low bits of `shifted` hold n in two's complement; moved up they add n to the exponent.
    VecF scaled = (VecF)((VecU)p + ((VecU)shifted << 23));
    return select(is_less(x, splat(-87.33654475f)), VecF{}, scaled);
}

struct TanhAndSlope {
    VecF tanh;
    VecF slope;  // 1 - tanh^2, with a small relative error where tanh is next to 1 too
};

// From e = exp(-2|x|) and e - 1, reduced like exp_nonpositive but without its leading 1, so that
// tanh keeps its relative accuracy next to 0: the errors of both stay under 4e-7 relative (tested
// through the soft cap). Beyond |x| = 43.5 the slope stays at 6e-38; NaN stays NaN.
LWZ_INLINE TanhAndSlope tanh_and_slope(VecF x) {
    const VecI sign = (VecI)x & INT32_MIN;
    const VecF y = larger(splat(-87.0f), (VecF)((VecI)x & INT32_MAX) * -2.0f);
    const VecF magic = splat(12582912.0f);
    const VecF shifted = y * 1.44269504088896341f + magic;
    const VecF n = shifted - magic;
    VecF r = y - n * 0.693145751953125f;
    r = r - n * 1.428606820309417232e-6f;
    VecF p = splat(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    const VecF scale = (VecF)((VecU)splat(1.0f) + ((VecU)shifted << 23));  // 2^n
    const VecF grown = p * r * scale;                                      // (exp(r) - 1) 2^n
    const VecF e = scale + grown;
    const VecF inverse = 1.0f / (1.0f + e);
    const VecF magnitude = ((1.0f - scale) - grown) * inverse;
    return {(VecF)((VecI)magnitude | sign), 4.0f * e * inverse * inverse};
}

}  // namespace

#endif  // LWZ_SIMD_H
