// The inner loops of attention over packed bf16 sequences, for AVX512-BF16 alone.
//
// Every product is one register tile of kTileRows rows and up to kTileVecs vectors: a pair of bf16
// of a row, broadcast, meets a vector of pairs. Work on what lies above the diagonal is left out in
// steps of kTileRows queries and a vector of keys.
#include "attention_kernel.h"

#if defined(__AVX512BF16__)

#include <cmath>

#include "simd.h"

namespace {

constexpr int kBlock = kAttentionBlock;
constexpr int kTileRows = 4;
constexpr int kTileVecs = 4;
constexpr int kPairs = kBlock / 2;
static_assert(kBlock == kTileVecs * kLanes, "a tile spans the keys of a block");
static_assert(kAttentionHeadStep == kTileVecs * kLanes, "a tile spans a step of the head");

LWZ_INLINE VecF load_pairs(const uint32_t* p) {
    VecF v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

LWZ_INLINE void add_products(VecF a, VecF b, VecF& sums) {
    sums = (VecF)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

// Pairs of a factor: pair k of row r is at data[r * row_stride + k * pair_stride].
struct Factor {
    const uint32_t* data;
    int64_t row_stride, pair_stride;
};

template <int kVecs>
LWZ_INLINE void multiply(const Factor& a, const uint32_t* b, int64_t b_stride, int depth,
                         VecF (&sums)[kTileRows][kTileVecs]) {
    for (int k = 0; k < depth; ++k) {
        VecF b_k[kVecs];
        for (int v = 0; v < kVecs; ++v) b_k[v] = load_pairs(b + k * b_stride + v * kLanes);
        for (int r = 0; r < kTileRows; ++r) {
            const uint32_t pair = a.data[r * a.row_stride + k * a.pair_stride];
            const VecF a_k = (VecF)_mm512_set1_epi32(static_cast<int>(pair));
            for (int v = 0; v < kVecs; ++v) add_products(a_k, b_k[v], sums[r][v]);
        }
    }
}

// Scores of a tile of rows with the first `num_vecs` vectors of a block of keys.
template <int kVecs>
LWZ_INLINE void score_vecs(const Factor& a, const uint32_t* keys, int depth,
                           float (&scores)[kTileRows][kBlock]) {
    VecF sums[kTileRows][kTileVecs] = {};
    multiply<kVecs>(a, keys, kBlock, depth, sums);
    for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < kVecs; ++v) store(scores[r] + v * kLanes, sums[r][v]);
    }
}

void score(const Factor& a, const uint32_t* keys, int depth, int num_vecs,
           float (&scores)[kTileRows][kBlock]) {
    switch (num_vecs) {
        case 1: return score_vecs<1>(a, keys, depth, scores);
        case 2: return score_vecs<2>(a, keys, depth, scores);
        case 3: return score_vecs<3>(a, keys, depth, scores);
        default: return score_vecs<4>(a, keys, depth, scores);
    }
}

// to[r, :] += a[r, :] b, for a tile of rows and a whole head.
void add_product(const Factor& a, const uint32_t* b, int head_size, int depth, float* to) {
    for (int d = 0; d < head_size; d += kAttentionHeadStep) {
        VecF sums[kTileRows][kTileVecs];
        for (int r = 0; r < kTileRows; ++r) {
            for (int v = 0; v < kTileVecs; ++v) {
                sums[r][v] = load(to + r * head_size + d + v * kLanes);
            }
        }
        multiply<kTileVecs>(a, b + d, head_size, depth, sums);
        for (int r = 0; r < kTileRows; ++r) {
            for (int v = 0; v < kTileVecs; ++v) {
                store(to + r * head_size + d + v * kLanes, sums[r][v]);
            }
        }
    }
}

// Of the vector that begins at key `first`, the lanes of keys below `limit`.
LWZ_INLINE __mmask16 lanes_below(int first, int limit) {
    const int count = limit - first;
    if (count >= kLanes) return 0xffff;
    return count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

LWZ_INLINE VecF keep(__mmask16 mask, VecF v) { return (VecF)_mm512_maskz_mov_ps(mask, (__m512)v); }

LWZ_INLINE void store_narrow(uint16_t* p, VecF v) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &narrow, sizeof(narrow));
}

int num_visible(const LwzKeyBlock& keys, int row_end) {
    return keys.is_diagonal && row_end < keys.count ? row_end : keys.count;
}

int num_vecs_of(int count) { return (count + kLanes - 1) / kLanes; }

int num_tiles_of(int count) { return (count + kTileRows - 1) / kTileRows; }

// Rows as pairs along the head, [block, head_size / 2]; rows up to a whole tile are 0.
void copy_rows(const LwzTokenRows& rows, int head_size, uint32_t* to) {
    const int64_t bytes = head_size * sizeof(uint16_t);
    for (int r = 0; r < rows.count; ++r) {
        std::memcpy(to + r * head_size / 2, rows.data + r * rows.stride, bytes);
    }
    const int padding = num_tiles_of(rows.count) * kTileRows - rows.count;
    std::memset(to + rows.count * head_size / 2, 0, padding * bytes);
}

void pack_by_dim(const LwzTokenRows& rows, int head_size, uint32_t* pack) {
    for (int pair = 0; pair < head_size / 2; ++pair) {
        uint32_t* to = pack + pair * kBlock;
        const uint16_t* from = rows.data + 2 * pair;
        for (int r = 0; r < rows.count; ++r) {
            std::memcpy(to + r, from + r * rows.stride, sizeof(*to));
        }
        for (int r = rows.count; r < kBlock; ++r) to[r] = 0;
    }
}

void pack_by_token(const LwzTokenRows& rows, int head_size, uint32_t* pack) {
    static const uint16_t kNone[kAttentionMaxHead] = {};
    for (int pair = 0; pair < kPairs; ++pair) {
        const int r = 2 * pair;
        const uint16_t* first = r < rows.count ? rows.data + r * rows.stride : kNone;
        const uint16_t* second = r + 1 < rows.count ? rows.data + (r + 1) * rows.stride : kNone;
        uint32_t* to = pack + pair * head_size;
        for (int d = 0; d < head_size; ++d) {
            to[d] = first[d] | static_cast<uint32_t>(second[d]) << 16;
        }
    }
}

// One query's softmax so far, relative to `max`.
struct Totals {
    float max = -__builtin_inff();
    float sum = 0.0f;
};

// Takes the scores of `limit` keys into the totals, writes exp(score - max) as bf16 for `num_vecs`
// vectors, and returns what sums so far shrink by.
LWZ_INLINE float soften(const float* scores, int limit, int num_vecs, float scale, Totals& totals,
                        uint16_t* weights) {
    VecF maxima = splat(-__builtin_inff());
    for (int v = 0; v < num_vecs; ++v) {
        const __mmask16 seen = lanes_below(v * kLanes, limit);
        maxima = (VecF)_mm512_mask_max_ps((__m512)maxima, seen, (__m512)maxima,
                                          (__m512)(load(scores + v * kLanes) * scale));
    }
    const float before = totals.max;
    const float found = _mm512_reduce_max_ps((__m512)maxima);
    totals.max = found > before ? found : before;
    VecF sums = {};
    for (int v = 0; v < num_vecs; ++v) {
        const __mmask16 seen = lanes_below(v * kLanes, limit);
        const VecF z = load(scores + v * kLanes) * scale - totals.max;
        const VecF weight = keep(seen, exp_nonpositive(z));
        sums += weight;
        store_narrow(weights + v * kLanes, weight);
    }
    const float shrink = before == totals.max ? 1.0f : std::exp(before - totals.max);
    totals.sum = totals.sum * shrink + _mm512_reduce_add_ps((__m512)sums);
    return shrink;
}

void forward(const LwzTokenRows& q, const LwzKeyBlock* keys, int num_blocks, int head_size,
             float scale, uint16_t* out, int64_t out_stride, float* lse) {
    alignas(64) uint32_t queries[kBlock * kAttentionMaxHead / 2];
    alignas(64) float acc[kBlock * kAttentionMaxHead];
    Totals totals[kBlock];
    copy_rows(q, head_size, queries);
    const int num_tiles = num_tiles_of(q.count);
    std::memset(acc, 0, sizeof(float) * num_tiles * kTileRows * head_size);
    for (const LwzKeyBlock* block = keys; block < keys + num_blocks; ++block) {
        for (int row = 0; row < num_tiles * kTileRows; row += kTileRows) {
            alignas(64) float scores[kTileRows][kBlock];
            alignas(64) uint32_t weights[kTileRows][kPairs];
            const int num_vecs = num_vecs_of(num_visible(*block, row + kTileRows));
            score({queries + row * head_size / 2, head_size / 2, 1}, block->k_by_dim,
                  head_size / 2, num_vecs, scores);
            for (int r = 0; r < kTileRows; ++r) {
                const float shrink =
                    soften(scores[r], num_visible(*block, row + r + 1), num_vecs, scale,
                           totals[row + r], reinterpret_cast<uint16_t*>(weights[r]));
                if (shrink == 1.0f) continue;
                float* sums = acc + (row + r) * head_size;
                for (int d = 0; d < head_size; d += kLanes) store(sums + d, load(sums + d) * shrink);
            }
            add_product({weights[0], kPairs, 1}, block->v_by_token, head_size,
                        num_vecs * kLanes / 2, acc + row * head_size);
        }
    }
    for (int r = 0; r < q.count; ++r) {
        const float inverse = 1.0f / totals[r].sum;
        for (int d = 0; d < head_size; d += kLanes) {
            store_narrow(out + r * out_stride + d, load(acc + r * head_size + d) * inverse);
        }
        lse[r] = totals[r].max + std::log(totals[r].sum);
    }
}

// Factors of the gradients of a block of queries with a block of keys.
struct Weights {
    alignas(64) uint32_t p_by_query[kPairs][kBlock];   // pairs of queries
    alignas(64) uint32_t ds_by_query[kPairs][kBlock];
    alignas(64) uint16_t ds[kBlock][kBlock];           // pairs of keys
};

// a and b as bf16: pairs of lanes in `pairs`, and the two one after the other in the result.
LWZ_INLINE __m512i narrow_both(VecF a, VecF b, uint32_t* pairs) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    _mm512_store_si512(pairs, _mm512_permutexvar_epi16(order, both));
    return both;
}

// p and ds of two queries with the vector of keys that begins at `key`.
LWZ_INLINE void write_weights(const float (&scores)[kTileRows][kBlock],
                              const float (&dp)[kTileRows][kBlock], const LwzKeyBlock& keys,
                              int row, int r, int key, float scale, const float* lse,
                              const float* delta, Weights& weights) {
    VecF p[2], ds[2];
    for (int i = 0; i < 2; ++i) {
        const int query = row + r + i;
        const __mmask16 seen = lanes_below(key, num_visible(keys, query + 1));
        const VecF log_p = load(scores[r + i] + key) * scale - lse[query];
        p[i] = keep(seen, exp_nonpositive(log_p));
        ds[i] = keep(seen, p[i] * (load(dp[r + i] + key) - delta[query]) * scale);
    }
    const int pair = (row + r) / 2;
    narrow_both(p[0], p[1], weights.p_by_query[pair] + key);
    const __m512i both = narrow_both(ds[0], ds[1], weights.ds_by_query[pair] + key);
    _mm256_store_si256(reinterpret_cast<__m256i*>(weights.ds[row + r] + key),
                       _mm512_castsi512_si256(both));
    _mm256_store_si256(reinterpret_cast<__m256i*>(weights.ds[row + r + 1] + key),
                       _mm512_extracti64x4_epi64(both, 1));
}

void backward(const LwzTokenRows& q, const LwzTokenRows& out, const LwzTokenRows& dout,
              const LwzKeyBlock* keys, int num_blocks, int head_size, float scale,
              const float* lse, uint16_t* dq, int64_t dq_stride) {
    constexpr int kMaxPairs = kBlock * kAttentionMaxHead / 2;
    alignas(64) uint32_t q_rows[kMaxPairs], dout_rows[kMaxPairs];
    alignas(64) uint32_t q_by_token[kMaxPairs], dout_by_token[kMaxPairs];
    alignas(64) float dq_acc[kBlock * kAttentionMaxHead];
    alignas(64) float row_lse[kBlock], delta[kBlock];
    Weights weights;
    copy_rows(q, head_size, q_rows);
    copy_rows(dout, head_size, dout_rows);
    pack_by_token(q, head_size, q_by_token);
    pack_by_token(dout, head_size, dout_by_token);
    const int num_rows = num_tiles_of(q.count) * kTileRows;
    std::memset(dq_acc, 0, sizeof(float) * num_rows * head_size);
    for (int r = 0; r < num_rows; ++r) {
        // A row that is not there has p = 0.
        row_lse[r] = r < q.count ? lse[r] : __builtin_inff();
        VecF sums = {};
        for (int d = 0; r < q.count && d < head_size; d += kLanes) {
            sums += load(reinterpret_cast<const bf16*>(out.data + r * out.stride + d)) *
                    load(reinterpret_cast<const bf16*>(dout.data + r * dout.stride + d));
        }
        delta[r] = _mm512_reduce_add_ps((__m512)sums);
    }
    for (const LwzKeyBlock* block = keys; block < keys + num_blocks; ++block) {
        for (int row = 0; row < num_rows; row += kTileRows) {
            alignas(64) float scores[kTileRows][kBlock], dp[kTileRows][kBlock];
            const int num_vecs = num_vecs_of(num_visible(*block, row + kTileRows));
            const int at = row * head_size / 2;
            score({q_rows + at, head_size / 2, 1}, block->k_by_dim, head_size / 2, num_vecs,
                  scores);
            score({dout_rows + at, head_size / 2, 1}, block->v_by_dim, head_size / 2, num_vecs,
                  dp);
            for (int r = 0; r < kTileRows; r += 2) {
                for (int key = 0; key < num_vecs * kLanes; key += kLanes) {
                    write_weights(scores, dp, *block, row, r, key, scale, row_lse, delta, weights);
                }
            }
            add_product({reinterpret_cast<uint32_t*>(weights.ds[row]), kPairs, 1},
                        block->k_by_token, head_size, num_vecs * kLanes / 2,
                        dq_acc + row * head_size);
        }
        for (int key = 0; key < block->count; key += kTileRows) {
            // Queries before a tile of keys on the diagonal do not see it.
            const int first = block->is_diagonal ? key / 2 : 0;
            const int depth = num_rows / 2 - first;
            if (depth <= 0) break;
            add_product({weights.p_by_query[first] + key, 1, kBlock},
                        dout_by_token + first * head_size, head_size, depth,
                        block->dv + key * head_size);
            add_product({weights.ds_by_query[first] + key, 1, kBlock},
                        q_by_token + first * head_size, head_size, depth,
                        block->dk + key * head_size);
        }
    }
    for (int r = 0; r < q.count; ++r) {
        for (int d = 0; d < head_size; d += kLanes) {
            store_narrow(dq + r * dq_stride + d, load(dq_acc + r * head_size + d));
        }
    }
}

void sum_parts(const float* parts, int64_t part_stride, int count, int rows, int head_size,
               uint16_t* to, int64_t to_stride) {
    for (int r = 0; r < rows; ++r) {
        for (int d = 0; d < head_size; d += kLanes) {
            const float* from = parts + r * head_size + d;
            VecF sum = load(from);
            for (int part = 1; part < count; ++part) sum += load(from + part * part_stride);
            store_narrow(to + r * to_stride + d, sum);
        }
    }
}

}  // namespace

LwzAttentionKernel lwz_attention_avx512_bf16() {
    return {pack_by_dim, pack_by_token, forward, backward, sum_parts};
}

#endif  // __AVX512BF16__
