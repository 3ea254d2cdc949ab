// The inner loops of the linear layer for few rows.
//
// Compiled once per instruction set, with LWZ_LINEAR_NAME naming the entry. The lanes of a vector
// are rows of x: one weight, broadcast, meets a vector of x^T. So there are no sums across lanes,
// and every output element is one chain of multiply-adds along k, the same for any number of rows.
#include "linear_kernel.h"

#include <type_traits>

#include "interface.h"
#include "simd.h"

namespace {

// Columns of a register tile for 1, 2, .. vectors of rows: columns * vectors accumulators, the
// first kHeldVecs vectors of x, and one broadcast weight have to fit the registers.
#if defined(__AVX512F__)
constexpr int kTileColumns[] = {8, 8, 8};
#elif defined(__AVX2__)
constexpr int kTileColumns[] = {8, 6, 4, 3};
#else
constexpr int kTileColumns[] = {4, 2};
#endif
constexpr int kMaxTileVecs = sizeof(kTileColumns) / sizeof(kTileColumns[0]);
constexpr int kHeldVecs = 3;
constexpr int kMaxTileColumns = 8;
// What a pass reads of x^T for one tile, 192 KiB at most, stays in the L2 cache.
constexpr int64_t kPassBlocks = 32;
constexpr int kLineBytes = 64;
constexpr int kEdge = 8;  // of the squares that are transposed

// Two neighbours along k, the first in the lower half, for the instructions that multiply and add
// both.
struct __attribute__((packed, may_alias)) Pair {
    uint32_t bits;
};

// Values along k in one element of the weight, and the elements in kDepthStep values.
template <typename T>
constexpr int kPerElement = std::is_same<T, Pair>::value ? 2 : 1;
template <typename T>
constexpr int64_t kStep = kDepthStep / kPerElement<T>;

#if defined(__AVX512BF16__)
LWZ_INLINE bool multiplies_pairs(const LwzLinear& linear) {
    return linear.x_dtype == kLwzBFloat16 && linear.weight_dtype == kLwzBFloat16;
}
#endif

typedef float Vec8F __attribute__((vector_size(32)));
typedef uint32_t Vec8U __attribute__((vector_size(32)));
typedef int32_t Vec8I __attribute__((vector_size(32)));
typedef uint16_t Vec8U16 __attribute__((vector_size(16)));

LWZ_INLINE void read(const float* p, Vec8F& v) { std::memcpy(&v, p, sizeof(v)); }

LWZ_INLINE void read(const bf16* p, Vec8F& v) {
    Vec8U16 narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    // See load(const bf16*) in simd.h.
#if defined(__AVX2__)
    const Vec8U wide = (Vec8U)_mm256_cvtepu16_epi32((__m128i)narrow);
#else
    const Vec8U wide = __builtin_convertvector(narrow, Vec8U);
#endif
    v = (Vec8F)(wide << 16);
}

LWZ_INLINE void write(float* p, const Vec8F& v) { std::memcpy(p, &v, sizeof(v)); }

// Rounds to nearest, ties to even; NaN stays NaN.
LWZ_INLINE void write(bf16* p, const Vec8F& v) {
    const Vec8U bits = (Vec8U)v;
    const Vec8U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Vec8U is_number = (Vec8U)(v == v);
    const Vec8U16 narrow =
        __builtin_convertvector((rounded & is_number) | (0x7fc0 & ~is_number), Vec8U16);
    std::memcpy(p, &narrow, sizeof(narrow));
}

LWZ_INLINE float widen(float x) { return x; }

LWZ_INLINE float widen(bf16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

LWZ_INLINE void transpose(Vec8F (&rows)[kEdge]) {
    Vec8F pairs[kEdge];
    for (int i = 0; i < kEdge; i += 2) {
        const Vec8F a = rows[i], b = rows[i + 1];
        pairs[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    Vec8F fours[kEdge];
    for (int i = 0; i < kEdge; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const Vec8F a = pairs[i + j], b = pairs[i + 2 + j];
            fours[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; ++i) {
        const Vec8F a = fours[i], b = fours[i + 4];
        rows[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
        rows[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

LWZ_INLINE void round_to(const float*, Vec8F&) {}

LWZ_INLINE void round_to(const bf16*, Vec8F& v) {
    bf16 narrow[kEdge];
    write(narrow, v);
    read(narrow, v);
}

// exp(-|x|), as wide as this instruction set has it.
LWZ_INLINE Vec8F exp_minus_abs(const Vec8F& x) {
    const Vec8F y = (Vec8F)((Vec8I)x | INT32_MIN);
    VecF wide = {};
    std::memcpy(&wide, &y, sizeof(y));
    wide = exp_nonpositive(wide);
    Vec8F e;
    std::memcpy(&e, &wide, sizeof(e));
    return e;
}

LWZ_INLINE Vec8F silu(const Vec8F& x) {
    const Vec8F e = exp_minus_abs(x);
    const Vec8I is_negative = (Vec8I)x >> 31;
    const Vec8F factor = (Vec8F)(((Vec8I)e & is_negative) |
                                 ((Vec8I)(Vec8F{} + 1.0f) & ~is_negative));
    return x * factor / (1.0f + e);
}

template <typename T>
float inverse_rms(const T* x, const LwzLinear& linear) {
    Vec8F sums = {};
    for (int64_t k = 0; k < linear.depth; k += kEdge) {
        Vec8F v;
        read(x + k, v);
        sums += v * v;
    }
    float sum = 0.0f;
    for (int i = 0; i < kEdge; ++i) sum += sums[i];
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(linear.depth) + linear.norm_eps);
}

// Eight values of a row of the input at k; `scale` is the row's inverse_rms.
template <typename T, int kInput>
LWZ_INLINE void read_input(const LwzLinear& linear, const T* x, int64_t k, float scale, Vec8F& v) {
    read(x + k, v);
    if constexpr (kInput == kLwzRmsNorm) {
        Vec8F weight;
        read(static_cast<const T*>(linear.norm_weight) + k, weight);
        v = v * scale * weight;
        round_to(x, v);
    } else if constexpr (kInput == kLwzSiluGate) {
        Vec8F up;
        read(x + linear.depth + k, up);
        v = silu(v);
        round_to(x, v);
        v *= up;
        round_to(x, v);
    }
}

LWZ_INLINE void write_packed(const LwzLinear& linear, int64_t vec, int64_t k, int lane,
                             const Vec8F (&square)[kEdge]) {
#if defined(__AVX512BF16__)
    if (multiplies_pairs(linear)) {
        float* to = linear.packed_x + (vec * linear.depth + k) / 2 * kLanes + lane;
        for (int i = 0; i < kEdge; i += 2) {
            // Exact: the values are those of bf16 already.
            const Vec8U pairs =
                ((Vec8U)square[i] >> 16) | ((Vec8U)square[i + 1] & 0xffff0000u);
            write(to + i / 2 * kLanes, (Vec8F)pairs);
        }
        return;
    }
#endif
    float* to = linear.packed_x + (vec * linear.depth + k) * kLanes + lane;
    for (int i = 0; i < kEdge; ++i) write(to + i * kLanes, square[i]);
}

template <typename T, int kInput>
void pack_input(const LwzLinear& linear, int64_t vec) {
    const int64_t x_stride = kInput == kLwzSiluGate ? 2 * linear.depth : linear.depth;
    const T* x = static_cast<const T*>(linear.x);
    for (int lane = 0; lane < kLanes; lane += kEdge) {
        const int64_t first_row = vec * kLanes + lane;
        float scales[kEdge] = {};
        if constexpr (kInput == kLwzRmsNorm) {
            for (int i = 0; i < kEdge && first_row + i < linear.num_rows; ++i) {
                scales[i] = inverse_rms(x + (first_row + i) * x_stride, linear);
            }
        }
        for (int64_t k = 0; k < linear.depth; k += kEdge) {
            Vec8F square[kEdge] = {};
            for (int i = 0; i < kEdge && first_row + i < linear.num_rows; ++i) {
                read_input<T, kInput>(linear, x + (first_row + i) * x_stride, k, scales[i],
                                      square[i]);
            }
            transpose(square);
            write_packed(linear, vec, k, lane, square);
        }
    }
}

template <typename T>
void pack_typed(const LwzLinear& linear, int64_t vec) {
    switch (linear.input) {
        case kLwzRmsNorm: return pack_input<T, kLwzRmsNorm>(linear, vec);
        case kLwzSiluGate: return pack_input<T, kLwzSiluGate>(linear, vec);
        default: return pack_input<T, kLwzPlain>(linear, vec);
    }
}

void pack(const LwzLinear& linear, int64_t vec) {
    if (linear.x_dtype == kLwzBFloat16) {
        pack_typed<bf16>(linear, vec);
    } else {
        pack_typed<float>(linear, vec);
    }
}

// The part of the problem that one register tile works on, over one block of k. Where T is Pair,
// everything that counts along k counts pairs.
template <typename T>
struct Tile {
    const T* weight;  // first column, first k of the block
    const T* ahead;   // where the tile that comes next begins: prefetched, never read
    int64_t stride;   // elements between two columns of both
    const float* x;   // [vecs, .., kLanes], first k of the block; lanes of pairs for Pair
    int64_t x_stride;
    int64_t depth;
    float* acc;
    int64_t acc_stride;
};

template <typename T, int kColumns>
LWZ_INLINE void prefetch(const Tile<T>& tile, int64_t k) {
    if (k % (kLineBytes / sizeof(T)) != 0) return;
    for (int c = 0; c < kColumns; ++c) __builtin_prefetch(tile.ahead + c * tile.stride + k);
}

LWZ_INLINE void add_product(const VecF& x, float w, VecF& sum) { sum += x * splat(w); }

#if defined(__AVX512BF16__)
LWZ_INLINE void add_product(const VecF& x, Pair w, VecF& sum) {
    sum = (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x,
                                 (__m512bh)_mm512_set1_epi32(static_cast<int>(w.bits)));
}
#endif

// sum += *x * w
template <typename Weight>
LWZ_INLINE void add_product_in_place(const float* x, Weight w, VecF& sum) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // The compiler would give *x a register and keep a sum on the stack for it.
    const auto& lanes = *reinterpret_cast<const float(*)[kLanes]>(x);
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(splat(w)), "m"(lanes));
#else
    add_product(load(x), w, sum);
#endif
}

// acc[c][v] += sum_k weight[c][k] * x[v][k]
template <typename T, int kColumns, int kVecs, typename Weight>
LWZ_INLINE void multiply(const Tile<T>& tile, const Weight* weight, int64_t stride) {
    constexpr int kHeld = kVecs < kHeldVecs ? kVecs : kHeldVecs;
    VecF sums[kColumns][kVecs] = {};
    for (int64_t block = 0; block < tile.depth; block += kStep<T>) {
        prefetch<T, kColumns>(tile, block);
#pragma GCC unroll 8
        for (int64_t k = block; k < block + kStep<T>; ++k) {
            const float* from = tile.x + k * kLanes;
            VecF x[kHeld];
            for (int v = 0; v < kHeld; ++v) x[v] = load(from + v * tile.x_stride);
            for (int c = 0; c < kColumns; ++c) {
                const Weight w = weight[c * stride + k];
                for (int v = 0; v < kHeld; ++v) add_product(x[v], w, sums[c][v]);
                for (int v = kHeld; v < kVecs; ++v) {
                    add_product_in_place(from + v * tile.x_stride, w, sums[c][v]);
                }
            }
        }
    }
    for (int c = 0; c < kColumns; ++c) {
        for (int v = 0; v < kVecs; ++v) {
            float* acc = tile.acc + c * tile.acc_stride + v * kLanes;
            store(acc, load(acc) + sums[c][v]);
        }
    }
}

template <int kColumns, int kVecs, typename T>
void multiply_tile(const Tile<T>& tile) {
    multiply<T, kColumns, kVecs>(tile, tile.weight, tile.stride);
}

template <int kColumns, int kVecs>
void multiply_tile(const Tile<bf16>& tile) {
    alignas(64) float wide[kColumns][kMaxBlockDepth];
    for (int c = 0; c < kColumns; ++c) {
        const bf16* from = tile.weight + c * tile.stride;
        for (int64_t k = 0; k < tile.depth; k += kEdge) {
            Vec8F v;
            read(from + k, v);
            write(&wide[c][k], v);
        }
    }
    multiply<bf16, kColumns, kVecs>(tile, &wide[0][0], kMaxBlockDepth);
}

// Takes the widest tile first; the columns that are left over take narrower ones.
template <typename T, int kColumns, int kVecs>
void multiply_ragged(const Tile<T>& tile, int64_t columns) {
    if constexpr (kColumns > 1) {
        if (columns < kColumns) return multiply_ragged<T, kColumns - 1, kVecs>(tile, columns);
    }
    multiply_tile<kColumns, kVecs>(tile);
}

// The part of k that is finished for all columns of a chunk before the next one is begun.
struct Pass {
    int64_t begin, end;
    int64_t block_depth;
    bool is_last;
};

template <typename T, int kVecs>
void accumulate_vecs(const LwzLinear& linear, int64_t begin, int64_t end, int64_t ahead,
                     int64_t vec, const Pass& pass, float* acc) {
    constexpr int kColumns = kTileColumns[kVecs - 1];
    const T* weight = static_cast<const T*>(linear.weight);
    const int64_t depth = linear.depth / kPerElement<T>;
    Tile<T> tile;
    tile.stride = depth;
    tile.x_stride = depth * kLanes;
    tile.acc_stride = linear.num_vecs * kLanes;
    for (int64_t column = begin; column < end; column += kColumns) {
        const T* next = weight + (column + kColumns) * depth;
        if (column + kColumns >= end) {
            next = pass.is_last ? weight + ahead * depth - pass.begin
                                : weight + begin * depth + pass.end - pass.begin;
        }
        tile.acc = acc + (column - begin) * tile.acc_stride + vec * kLanes;
        for (int64_t block = pass.begin; block < pass.end; block += pass.block_depth) {
            tile.weight = weight + column * depth + block;
            tile.ahead = next + block;
            tile.x = linear.packed_x + (vec * depth + block) * kLanes;
            tile.depth = pass.end - block < pass.block_depth ? pass.end - block : pass.block_depth;
            multiply_ragged<T, kColumns, kVecs>(tile, end - column);
        }
    }
}

template <typename T>
void initialize(const LwzLinear& linear, int64_t begin, int64_t end, float* acc) {
    const T* bias = static_cast<const T*>(linear.bias);
    for (int64_t column = begin; column < end; ++column) {
        const VecF value = splat(bias == nullptr ? 0.0f : widen(bias[column]));
        for (int64_t vec = 0; vec < linear.num_vecs; ++vec) {
            store(acc + ((column - begin) * linear.num_vecs + vec) * kLanes, value);
        }
    }
}

template <typename T>
void accumulate_typed(const LwzLinear& linear, int64_t begin, int64_t end, int64_t ahead,
                      float* acc) {
    const int64_t depth = linear.depth / kPerElement<T>;
    const int64_t num_blocks = (depth + kMaxBlockDepth - 1) / kMaxBlockDepth;
    const int64_t steps = depth / kStep<T>;
    const int64_t block_depth = (steps + num_blocks - 1) / num_blocks * kStep<T>;
    const int64_t pass_depth = kPassBlocks * block_depth;
    const int64_t num_tiles = (linear.num_vecs + kMaxTileVecs - 1) / kMaxTileVecs;
    for (int64_t k = 0; k < depth; k += pass_depth) {
        const int64_t pass_end = depth - k < pass_depth ? depth : k + pass_depth;
        const Pass pass{k, pass_end, block_depth, pass_end == depth};
        for (int64_t i = 0; i < num_tiles; ++i) {
            // Equal tiles: 6 vectors run as 3 + 3 rather than 4 + 2.
            const int64_t vec = i * linear.num_vecs / num_tiles;
            switch ((i + 1) * linear.num_vecs / num_tiles - vec) {
                case 1: accumulate_vecs<T, 1>(linear, begin, end, ahead, vec, pass, acc); break;
                case 2: accumulate_vecs<T, 2>(linear, begin, end, ahead, vec, pass, acc); break;
#if defined(__AVX2__)
                case 3: accumulate_vecs<T, 3>(linear, begin, end, ahead, vec, pass, acc); break;
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
                case 4: accumulate_vecs<T, 4>(linear, begin, end, ahead, vec, pass, acc); break;
#endif
                default: __builtin_unreachable();  // a tile has at most kMaxTileVecs
            }
        }
    }
}

void accumulate(const LwzLinear& linear, int64_t begin, int64_t end, int64_t ahead, float* acc) {
    if (linear.weight_dtype != kLwzBFloat16) {
        initialize<float>(linear, begin, end, acc);
        return accumulate_typed<float>(linear, begin, end, ahead, acc);
    }
    initialize<bf16>(linear, begin, end, acc);
#if defined(__AVX512BF16__)
    if (multiplies_pairs(linear)) return accumulate_typed<Pair>(linear, begin, end, ahead, acc);
#endif
    accumulate_typed<bf16>(linear, begin, end, ahead, acc);
}

// Rounds `count` values, adds the residual, and writes them.
template <typename T>
LWZ_INLINE void finish(T* out, const T* residual, int64_t count, Vec8F& v) {
    T values[kEdge] = {};
    const bool is_whole = count == kEdge;
    if (residual != nullptr) {
        if (!is_whole) std::memcpy(values, residual, count * sizeof(T));
        Vec8F addend;
        read(is_whole ? residual : values, addend);
        round_to(out, v);
        v += addend;
    }
    if (is_whole) {
        write(out, v);
    } else {
        write(values, v);
        std::memcpy(out, values, count * sizeof(T));
    }
}

template <typename T>
void write_typed(const LwzLinear& linear, int64_t begin, int64_t end, const float* acc) {
    const int64_t acc_stride = linear.num_vecs * kLanes;
    T* out = static_cast<T*>(linear.out);
    const T* residual = static_cast<const T*>(linear.residual);
    for (int64_t row = 0; row < linear.num_rows; row += kEdge) {
        const int64_t rows = linear.num_rows - row < kEdge ? linear.num_rows - row : kEdge;
        for (int64_t column = begin; column < end; column += kEdge) {
            const int64_t columns = end - column < kEdge ? end - column : kEdge;
            Vec8F square[kEdge] = {};
            for (int64_t i = 0; i < columns; ++i) {
                read(acc + (column - begin + i) * acc_stride + row, square[i]);
            }
            transpose(square);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t at = (row + i) * linear.num_columns + column;
                finish(out + at, residual == nullptr ? nullptr : residual + at, columns,
                       square[i]);
            }
        }
    }
}

void write_out(const LwzLinear& linear, int64_t begin, int64_t end, const float* acc) {
    if (linear.out_dtype == kLwzBFloat16) {
        write_typed<bf16>(linear, begin, end, acc);
    } else {
        write_typed<float>(linear, begin, end, acc);
    }
}

}  // namespace

LwzLinearKernel LWZ_LINEAR_NAME() { return {kLanes, pack, accumulate, write_out}; }
