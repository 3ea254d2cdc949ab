// Attention of a few query heads over one range of paged keys: the inner loops.
//
// Compiled once per instruction set, with LWZ_KERNEL_NAME naming the entry. Bound by reading K and
// V once: each loaded vector is used for all query heads of a tile. Online softmax in fp32, over
// blocks of kBlockKeys keys whose row addresses are looked up first, so any page size works.
#include "paged_attention_kernel.h"

#include <type_traits>

#include "paged_attention.h"
#include "simd.h"

namespace {

constexpr int kBlockKeys = 64;
constexpr int kTileKeys = 4;
// kTileKeys * heads accumulators and the operands of one step have to fit the registers.
constexpr int kTileHeads = kRegisters == 32 ? 5 : 3;
constexpr int kTileVecs = 4;
constexpr int kLineBytes = 64;

template <typename T>
struct Block {
    const T* k_rows[kBlockKeys];
    const T* v_rows[kBlockKeys];
    int num_keys;         // valid rows
    int num_padded_keys;  // up to a multiple of kLanes; the last valid row is repeated
};

template <typename T>
const Block<T> kNothing = {};

template <typename T>
void locate_rows(const LwzChunk& chunk, int64_t key, Block<T>& block) {
    const int64_t left = chunk.key_end - key;
    block.num_keys = left < kBlockKeys ? static_cast<int>(left) : kBlockKeys;
    block.num_padded_keys = (block.num_keys + kLanes - 1) / kLanes * kLanes;
    int filled = 0;
    while (filled < block.num_keys) {
        const int64_t page = (key + filled) / chunk.page_size;
        int64_t offset = (key + filled) % chunk.page_size;
        const int64_t base = static_cast<int64_t>(chunk.pages[page]) * chunk.page_stride;
        for (; offset < chunk.page_size && filled < block.num_keys; ++offset, ++filled) {
            const int64_t at = base + offset * chunk.row_stride;
            block.k_rows[filled] = static_cast<const T*>(chunk.k_cache) + at;
            block.v_rows[filled] = static_cast<const T*>(chunk.v_cache) + at;
        }
    }
    for (int i = block.num_keys; i < block.num_padded_keys; ++i) {
        block.k_rows[i] = block.k_rows[block.num_keys - 1];
    }
}

// Brings a head's keys and values of a later block into the L2 cache: the share that falls to keys
// [begin, end) of the `total` of the present one. Rows lie where the page table says, so the
// processor cannot guess them.
template <typename T>
LWZ_INLINE void fetch_rows(const Block<T>& ahead, int begin, int end, int total, int64_t column,
                           int64_t head_size) {
    for (int t = ahead.num_keys * begin / total; t < ahead.num_keys * end / total; ++t) {
        for (int64_t d = 0; d < head_size; d += kLineBytes / static_cast<int64_t>(sizeof(T))) {
            __builtin_prefetch(ahead.k_rows[t] + column + d, 0, 2);
            __builtin_prefetch(ahead.v_rows[t] + column + d, 0, 2);
        }
    }
}

// What one product takes: fp32 values, widened where memory has bf16; or, as bf16 themselves, pairs
// of neighbours.
template <typename T>
LWZ_INLINE VecF load_operand(const T* p, float) {
    return load(p);
}

LWZ_INLINE void add_products(VecF a, VecF b, VecF& sums, float) { sums += a * b; }

// Values of a row that one instruction multiplies.
template <typename Operand>
constexpr int kOperandLanes = kLanes * static_cast<int>(sizeof(float) / sizeof(Operand));

#if defined(__AVX512BF16__)
LWZ_INLINE VecF load_operand(const bf16* p, bf16) {
    VecF v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

LWZ_INLINE void add_products(VecF a, VecF b, VecF& sums, bf16) {
    sums = (VecF)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#endif

// scores[h][i] = scale * (q[h] . k[i]) for a tile of heads and all padded keys of the block.
// `column` is where the tile's KV head begins in a row.
template <int kHeads, typename T, typename Operand>
LWZ_INLINE void score_block(const Block<T>& block, const Block<T>& ahead, int64_t column,
                            const Operand* q, int64_t head_size, float scale,
                            float (*scores)[kBlockKeys]) {
    constexpr Operand kKind{};
    for (int i = 0; i < block.num_padded_keys; i += kTileKeys) {
        const T* const* rows = block.k_rows + i;
        fetch_rows(ahead, i, i + kTileKeys, block.num_padded_keys, column, head_size);
        VecF sums[kHeads][kTileKeys] = {};
        for (int64_t d = 0; d < head_size; d += kOperandLanes<Operand>) {
            VecF k[kTileKeys];
            for (int t = 0; t < kTileKeys; ++t) k[t] = load_operand(rows[t] + column + d, kKind);
            for (int h = 0; h < kHeads; ++h) {
                const VecF q_d = load_operand(q + h * head_size + d, kKind);
                for (int t = 0; t < kTileKeys; ++t) add_products(q_d, k[t], sums[h][t], kKind);
            }
        }
        for (int h = 0; h < kHeads; ++h) {
            const Vec4F four = sum_lanes(sums[h][0], sums[h][1], sums[h][2], sums[h][3]) * scale;
            std::memcpy(&scores[h][i], &four, sizeof(four));
        }
    }
}

// Turns scores into exp(score - new max), rounded to Weight, updates max and sum, and returns the
// factor by which what was accumulated under the old max shrinks.
template <typename Weight>
LWZ_INLINE float softmax_block(float* scores, Weight* weights, int num_keys, int num_padded_keys,
                               float& row_max, float& row_sum) {
    VecF maxima = splat(row_max);
    // Padding repeats a valid key, so it cannot raise the maximum.
    for (int i = 0; i < num_padded_keys; i += kLanes) {
        const VecF s = load(scores + i);
        maxima = select(s > maxima, s, maxima);
    }
    float new_max = row_max;
    for (int i = 0; i < kLanes; ++i) new_max = maxima[i] > new_max ? maxima[i] : new_max;
    for (int i = 0; i < num_padded_keys; i += kLanes) {
        store(weights + i, exp_nonpositive(load(scores + i) - new_max));
    }
    for (int i = num_keys; i < num_padded_keys; ++i) weights[i] = Weight{};
    VecF sums = VecF{};
    for (int i = 0; i < num_padded_keys; i += kLanes) sums += load(weights + i);
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    const float shrink = __builtin_expf(row_max - new_max);  // 0 at first: row_max is -inf
    row_sum = row_sum * shrink + sum;
    row_max = new_max;
    return shrink;
}

// acc[h][d..] = shrink[h] * acc[h][d..] + sum_i weights[h][i] * v[i][d..] for kColumns columns.
template <int kHeads, int kColumns, typename T>
LWZ_INLINE void accumulate_columns(const Block<T>& block, int64_t column,
                                   const float (*weights)[kBlockKeys], const float* shrink,
                                   int64_t d, int64_t head_size, float* acc) {
    constexpr int kVecs = kColumns / kLanes;
    VecF sums[kHeads][kVecs];
    for (int h = 0; h < kHeads; ++h) {
        for (int j = 0; j < kVecs; ++j) {
            sums[h][j] = load(acc + h * head_size + d + j * kLanes) * shrink[h];
        }
    }
    for (int i = 0; i < block.num_keys; ++i) {
        // One vector of V and the weights of all heads: the other way round, AVX2 has one register
        // too few, and a sum that lives on the stack holds the others up.
        VecF w[kHeads];
        for (int h = 0; h < kHeads; ++h) w[h] = splat(weights[h][i]);
        const T* row = block.v_rows[i] + column + d;
        for (int j = 0; j < kVecs; ++j) {
            const VecF v = load(row + j * kLanes);
            for (int h = 0; h < kHeads; ++h) sums[h][j] += v * w[h];
        }
    }
    for (int h = 0; h < kHeads; ++h) {
        for (int j = 0; j < kVecs; ++j) store(acc + h * head_size + d + j * kLanes, sums[h][j]);
    }
}

#if defined(__AVX512BF16__)
// The same from pairs of keys. Interleaving two rows of V leaves columns 8i to 8i + 3 in one
// vector, 8i + 4 to 8i + 7 in the other.
template <int kHeads, int kColumns>
LWZ_INLINE void accumulate_columns(const Block<bf16>& block, int64_t column,
                                   const bf16 (*weights)[kBlockKeys], const float* shrink,
                                   int64_t d, int64_t head_size, float* acc) {
    constexpr int kPairedLanes = kOperandLanes<bf16>, kPairs = kColumns / kPairedLanes;
    VecF low[kHeads][kPairs], high[kHeads][kPairs];
    for (int h = 0; h < kHeads; ++h) {
        for (int j = 0; j < kPairs; ++j) {
            const float* from = acc + h * head_size + d + j * kPairedLanes;
            const VecF a = load(from) * shrink[h], b = load(from + kLanes) * shrink[h];
            low[h][j] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24,
                                                25, 26, 27);
            high[h][j] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23,
                                                 28, 29, 30, 31);
        }
    }
    for (int i = 0; i < block.num_keys; i += 2) {
        const bf16* first = block.v_rows[i] + column + d;
        const bool has_second = i + 1 < block.num_keys;
        const bf16* second = has_second ? block.v_rows[i + 1] + column + d : first;
        // The weight of a key that is not there is 0; a product with an infinity would not be.
        const __mmask16 kept = has_second ? 0xffff : 0;
        VecF pair_of_weights[kHeads];
        for (int h = 0; h < kHeads; ++h) {
            int32_t bits;
            std::memcpy(&bits, &weights[h][i], sizeof(bits));
            pair_of_weights[h] = (VecF)_mm512_set1_epi32(bits);
        }
        for (int j = 0; j < kPairs; ++j) {
            const __m512i a = _mm512_loadu_si512(first + j * kPairedLanes);
            const __m512i b = _mm512_maskz_loadu_epi32(kept, second + j * kPairedLanes);
            const VecF lows = (VecF)_mm512_unpacklo_epi16(a, b);
            const VecF highs = (VecF)_mm512_unpackhi_epi16(a, b);
            for (int h = 0; h < kHeads; ++h) {
                add_products(lows, pair_of_weights[h], low[h][j], bf16{});
                add_products(highs, pair_of_weights[h], high[h][j], bf16{});
            }
        }
    }
    for (int h = 0; h < kHeads; ++h) {
        for (int j = 0; j < kPairs; ++j) {
            const VecF a = low[h][j], b = high[h][j];
            float* to = acc + h * head_size + d + j * kPairedLanes;
            store(to, __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21,
                                              22, 23));
            store(to + kLanes, __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13,
                                                       14, 15, 28, 29, 30, 31));
        }
    }
}
#endif

// A tile's query heads as operands: themselves, or widened into `wide`.
template <typename T>
LWZ_INLINE const T* operands_of(const T* q, int64_t, T*) {
    return q;
}

LWZ_INLINE const float* operands_of(const bf16* q, int64_t count, float* wide) {
    for (int64_t i = 0; i < count; i += kLanes) store(wide + i, load(q + i));
    return wide;
}

// The query heads [head, head + kHeads) of the chunk, which share the KV head at `column`.
template <typename T, typename Operand, int kHeads>
void attend_tile(const LwzChunk& chunk, const Block<T>& block, const Block<T>& ahead,
                 int64_t column, int64_t head) {
    constexpr bool kWidens = !std::is_same<T, Operand>::value;
    alignas(64) float scores[kHeads][kBlockKeys];
    alignas(64) Operand weights[kHeads][kBlockKeys];
    alignas(64) Operand wide_q[kWidens ? kHeads * kMaxHeadSize : 1];
    float shrink[kHeads];
    const int64_t head_size = chunk.head_size;
    const Operand* q = operands_of(static_cast<const T*>(chunk.q) + head * head_size,
                                   kHeads * head_size, wide_q);
    float* acc = chunk.acc + head * head_size;
    score_block<kHeads>(block, ahead, column, q, head_size, chunk.softmax_scale, scores);
    for (int h = 0; h < kHeads; ++h) {
        shrink[h] = softmax_block(scores[h], weights[h], block.num_keys, block.num_padded_keys,
                                  chunk.row_max[head + h], chunk.row_sum[head + h]);
    }
    constexpr int kTileColumns = kTileVecs * kLanes, kLeastColumns = kOperandLanes<Operand>;
    int64_t d = 0;
    for (; d + kTileColumns <= head_size; d += kTileColumns) {
        accumulate_columns<kHeads, kTileColumns>(block, column, weights, shrink, d, head_size, acc);
    }
    for (; d < head_size; d += kLeastColumns) {
        accumulate_columns<kHeads, kLeastColumns>(block, column, weights, shrink, d, head_size,
                                                  acc);
    }
}

template <typename T, typename Operand>
void attend_heads(const LwzChunk& chunk, const Block<T>& block, const Block<T>& ahead,
                  int64_t column, int64_t head, int64_t count) {
    switch (count) {
        case 1: return attend_tile<T, Operand, 1>(chunk, block, ahead, column, head);
        case 2: return attend_tile<T, Operand, 2>(chunk, block, ahead, column, head);
        case 3: return attend_tile<T, Operand, 3>(chunk, block, ahead, column, head);
#if defined(__AVX512F__)
        case 4: return attend_tile<T, Operand, 4>(chunk, block, ahead, column, head);
        case 5: return attend_tile<T, Operand, 5>(chunk, block, ahead, column, head);
#endif
        default: __builtin_unreachable();  // the caller asks for at most kTileHeads
    }
}

template <typename T, typename Operand>
void attend_typed(const LwzChunk& chunk, const LwzChunk& next) {
    const int64_t heads = chunk.num_kv_heads * chunk.group;
    for (int64_t h = 0; h < heads; ++h) {
        chunk.row_max[h] = -__builtin_inff();
        chunk.row_sum[h] = 0.0f;
    }
    for (int64_t i = 0; i < heads * chunk.head_size; ++i) chunk.acc[i] = 0.0f;
    // Equal tiles: 4 heads run as 2 + 2 rather than 3 + 1.
    const int64_t num_tiles = (chunk.group + kTileHeads - 1) / kTileHeads;
    Block<T> blocks[2];
    locate_rows(chunk, chunk.key_begin, blocks[0]);
    int current = 0;
    for (int64_t key = chunk.key_begin; key < chunk.key_end; key += kBlockKeys) {
        const Block<T>& block = blocks[current];
        Block<T>& ahead = blocks[current ^= 1];
        if (key + kBlockKeys < chunk.key_end) {
            locate_rows(chunk, key + kBlockKeys, ahead);
        } else {
            locate_rows(next, next.key_begin, ahead);
        }
        for (int64_t j = 0; j < chunk.num_kv_heads; ++j) {
            for (int64_t tile = 0; tile < num_tiles; ++tile) {
                const int64_t head = tile * chunk.group / num_tiles;
                const int64_t next_head = (tile + 1) * chunk.group / num_tiles;
                // The first tile of a KV head has fetched its keys and values.
                const Block<T>& fetched = tile == 0 ? ahead : kNothing<T>;
                attend_heads<T, Operand>(chunk, block, fetched, j * chunk.head_size,
                                         j * chunk.group + head, next_head - head);
            }
        }
    }
}

void attend(const LwzChunk& chunk, const LwzChunk& next) {
    if (chunk.dtype != kLwzBFloat16) return attend_typed<float, float>(chunk, next);
#if defined(__AVX512BF16__)
    if (chunk.head_size % kOperandLanes<bf16> == 0) return attend_typed<bf16, bf16>(chunk, next);
#endif
    attend_typed<bf16, float>(chunk, next);
}

void vector_exp(const float* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, exp_nonpositive(load(x + i)));
}

}  // namespace

LwzKernel LWZ_KERNEL_NAME() { return {kLanes, attend, vector_exp}; }
