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
    return select(x < -87.33654475f, VecF{}, scaled);
}

}  // namespace

#endif  // LWZ_SIMD_H
