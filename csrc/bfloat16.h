// Conversions of single bfloat16 values, for the drivers; kernels have vectors of them (simd.h).
#ifndef LWZ_BFLOAT16_H
#define LWZ_BFLOAT16_H

#include <cmath>
#include <cstdint>
#include <cstring>

inline float bf16_to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    if (std::isnan(value)) return 0x7fc0;
    return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

#endif  // LWZ_BFLOAT16_H
