// Attention of a few query heads over one range of paged keys: the inner loops.
//
// Compiled once per instruction set, with LWZ_KERNEL_NAME naming the entry. Bound by reading K and
// V once: each loaded vector is used for all query heads of a tile. Online softmax in fp32, over
// blocks of kBlockKeys keys whose row addresses are looked up first, so any page size works.
#include "paged_attention_kernel.h"

#include "paged_attention.h"
#include "simd.h"

namespace {

constexpr int kBlockKeys = 64;
constexpr int kTileKeys = 4;
// kTileKeys * heads accumulators and the operands of one step have to fit the registers.
constexpr int kTileHeads = kRegisters == 32 ? 5 : 3;
constexpr int kTileVecs = 4;

template <typename T>
struct Block {
    const T* k_rows[kBlockKeys];
    const T* v_rows[kBlockKeys];
    int num_keys;         // valid rows
    int num_padded_keys;  // up to a multiple of kLanes; the last valid row is repeated
};

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

// scores[h][i] = q[h] . k[i] for a tile of heads and all padded keys of the block. `column` is
// where the tile's KV head begins in a row.
template <typename T, int kHeads>
LWZ_INLINE void score_block(const Block<T>& block, int64_t column, const float* q,
                            int64_t head_size, float (*scores)[kBlockKeys]) {
    for (int i = 0; i < block.num_padded_keys; i += kTileKeys) {
        const T* const* rows = block.k_rows + i;
        VecF sums[kHeads][kTileKeys] = {};
        for (int64_t d = 0; d < head_size; d += kLanes) {
            VecF k[kTileKeys];
            for (int t = 0; t < kTileKeys; ++t) k[t] = load(rows[t] + column + d);
            for (int h = 0; h < kHeads; ++h) {
                const VecF q_d = load(q + h * head_size + d);
                for (int t = 0; t < kTileKeys; ++t) sums[h][t] += q_d * k[t];
            }
        }
        for (int h = 0; h < kHeads; ++h) {
            const Vec4F four = sum_lanes(sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
            std::memcpy(&scores[h][i], &four, sizeof(four));
        }
    }
}

// Turns scores into exp(score - new max), updates max and sum, and returns the factor by which
// what was accumulated under the old max shrinks.
LWZ_INLINE float softmax_block(float* scores, int num_keys, int num_padded_keys, float& row_max,
                               float& row_sum) {
    VecF maxima = splat(row_max);
    // Padding repeats a valid key, so it cannot raise the maximum.
    for (int i = 0; i < num_padded_keys; i += kLanes) {
        const VecF s = load(scores + i);
        maxima = select(s > maxima, s, maxima);
    }
    float new_max = row_max;
    for (int i = 0; i < kLanes; ++i) new_max = maxima[i] > new_max ? maxima[i] : new_max;
    for (int i = 0; i < num_padded_keys; i += kLanes) {
        store(scores + i, exp_nonpositive(load(scores + i) - new_max));
    }
    for (int i = num_keys; i < num_padded_keys; ++i) scores[i] = 0.0f;
    VecF sums = VecF{};
    for (int i = 0; i < num_padded_keys; i += kLanes) sums += load(scores + i);
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    const float shrink = __builtin_expf(row_max - new_max);  // 0 at first: row_max is -inf
    row_sum = row_sum * shrink + sum;
    row_max = new_max;
    return shrink;
}

// acc[h][d..] = shrink[h] * acc[h][d..] + sum_i scores[h][i] * v[i][d..], kVecs vectors wide.
template <typename T, int kHeads, int kVecs>
LWZ_INLINE void accumulate_columns(const Block<T>& block, int64_t column,
                                   const float (*scores)[kBlockKeys], const float* shrink,
                                   int64_t d, int64_t head_size, float* acc) {
    VecF sums[kHeads][kVecs];
    for (int h = 0; h < kHeads; ++h) {
        for (int j = 0; j < kVecs; ++j) {
            sums[h][j] = load(acc + h * head_size + d + j * kLanes) * shrink[h];
        }
    }
    for (int i = 0; i < block.num_keys; ++i) {
        // One vector of V and the weights of all heads: the other way round, AVX2 has one register
        // too few, and a sum that lives on the stack holds the others up.
        VecF weights[kHeads];
        for (int h = 0; h < kHeads; ++h) weights[h] = splat(scores[h][i]);
        const T* row = block.v_rows[i] + column + d;
        for (int j = 0; j < kVecs; ++j) {
            const VecF v = load(row + j * kLanes);
            for (int h = 0; h < kHeads; ++h) sums[h][j] += v * weights[h];
        }
    }
    for (int h = 0; h < kHeads; ++h) {
        for (int j = 0; j < kVecs; ++j) store(acc + h * head_size + d + j * kLanes, sums[h][j]);
    }
}

// The query heads [head, head + kHeads) of the chunk, which share the KV head at `column`.
template <typename T, int kHeads>
void attend_tile(const LwzChunk& chunk, const Block<T>& block, int64_t column, int64_t head) {
    alignas(64) float scores[kHeads][kBlockKeys];
    float shrink[kHeads];
    const int64_t head_size = chunk.head_size;
    float* acc = chunk.acc + head * head_size;
    score_block<T, kHeads>(block, column, chunk.q + head * head_size, head_size, scores);
    for (int h = 0; h < kHeads; ++h) {
        shrink[h] = softmax_block(scores[h], block.num_keys, block.num_padded_keys,
                                  chunk.row_max[head + h], chunk.row_sum[head + h]);
    }
    int64_t d = 0;
    for (; d + kTileVecs * kLanes <= head_size; d += kTileVecs * kLanes) {
        accumulate_columns<T, kHeads, kTileVecs>(block, column, scores, shrink, d, head_size, acc);
    }
    for (; d < head_size; d += kLanes) {
        accumulate_columns<T, kHeads, 1>(block, column, scores, shrink, d, head_size, acc);
    }
}

template <typename T>
void attend_heads(const LwzChunk& chunk, const Block<T>& block, int64_t column, int64_t head,
                  int64_t count) {
    switch (count) {
        case 1: return attend_tile<T, 1>(chunk, block, column, head);
        case 2: return attend_tile<T, 2>(chunk, block, column, head);
        case 3: return attend_tile<T, 3>(chunk, block, column, head);
#if defined(__AVX512F__)
        case 4: return attend_tile<T, 4>(chunk, block, column, head);
        case 5: return attend_tile<T, 5>(chunk, block, column, head);
#endif
        default: __builtin_unreachable();  // the caller asks for at most kTileHeads
    }
}

template <typename T>
void attend_typed(const LwzChunk& chunk) {
    const int64_t heads = chunk.num_kv_heads * chunk.group;
    for (int64_t h = 0; h < heads; ++h) {
        chunk.row_max[h] = -__builtin_inff();
        chunk.row_sum[h] = 0.0f;
    }
    for (int64_t i = 0; i < heads * chunk.head_size; ++i) chunk.acc[i] = 0.0f;
    // Equal tiles: 4 heads run as 2 + 2 rather than 3 + 1.
    const int64_t num_tiles = (chunk.group + kTileHeads - 1) / kTileHeads;
    Block<T> block;
    for (int64_t key = chunk.key_begin; key < chunk.key_end; key += kBlockKeys) {
        locate_rows(chunk, key, block);
        for (int64_t j = 0; j < chunk.num_kv_heads; ++j) {
            for (int64_t tile = 0; tile < num_tiles; ++tile) {
                const int64_t head = tile * chunk.group / num_tiles;
                const int64_t next = (tile + 1) * chunk.group / num_tiles;
                attend_heads(chunk, block, j * chunk.head_size, j * chunk.group + head,
                             next - head);
            }
        }
    }
}

void attend(const LwzChunk& chunk) {
    if (chunk.dtype == kLwzBFloat16) {
        attend_typed<bf16>(chunk);
    } else {
        attend_typed<float>(chunk);
    }
}

void vector_exp(const float* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, exp_nonpositive(load(x + i)));
}

}  // namespace

LwzKernel LWZ_KERNEL_NAME() { return {kLanes, attend, vector_exp}; }
