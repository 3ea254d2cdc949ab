// What all parts of the native library share: versions, status codes, data types, and levels.
#ifndef LWZ_INTERFACE_H
#define LWZ_INTERFACE_H

#include <cstdint>

#define LWZ_EXPORT extern "C" __attribute__((visibility("default")))

// Raised with every change of a C signature; native.py refuses a library of another version.
constexpr int kLwzAbiVersion = 6;

enum LwzStatus : int {
    kLwzOk = 0,
    kLwzUnsupportedHeadSize = 1,
    kLwzUnsupportedLevel = 2,
    kLwzPageOutOfRange = 3,
    kLwzContextTooLong = 4,
    kLwzSlotOutOfRange = 5,
    kLwzOutOfMemory = 6,
    kLwzUnsupportedDepth = 7,
    kLwzEmptyVocabulary = 8,
};

enum LwzDtype : int { kLwzFloat32 = 0, kLwzBFloat16 = 1 };

// Instruction sets that the kernels are compiled for, narrowest first.
// kLwzAvx512Bf16 multiplies pairs of bf16.
enum LwzLevel : int { kLwzGeneric = 0, kLwzAvx2 = 1, kLwzAvx512 = 2, kLwzAvx512Bf16 = 3 };

LWZ_EXPORT int lwz_abi_version();

// The widest level that both this build and this processor have.
LWZ_EXPORT int lwz_best_level();

// 1 if the library was compiled with OpenMP, else 0 (then every call runs on one thread).
LWZ_EXPORT int lwz_has_openmp();

#endif  // LWZ_INTERFACE_H
