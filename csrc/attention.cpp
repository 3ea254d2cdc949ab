// The driver of attention over packed sequences: packs, work items, threads.
//
// Forward, a block of queries of a head is an item. Backward, all sequences with one prefix and a
// head are: they add to the same keys, one after another, whatever the number of threads. Query
// heads of one KV head have sums of their own, which are added up at the end.
#include "attention.h"

#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "attention_kernel.h"

namespace {

#if defined(LWZ_HAVE_X86_LEVELS)

constexpr int64_t kBlock = kAttentionBlock;

enum Pack { kKByDim, kVByToken, kVByDim = kVByToken, kKByToken, kNumPacks };

struct Plan {
    const LwzAttentionCall& call;
    const LwzAttentionKernel kernel = lwz_attention_avx512_bf16();
    std::vector<int64_t> first_token;  // [num_sequences]
    std::vector<int64_t> first_block;  // [num_sequences]
    std::vector<int64_t> sequence_of;  // [num_blocks]
    std::unique_ptr<uint32_t[]> packs;
    int64_t most_seen = 0;  // blocks of keys that one block of queries sees
    std::unique_ptr<LwzKeyBlock[]> seen;  // [num_threads, most_seen]

    Plan(const LwzAttentionCall& of, int64_t num_packs) : call(of) {
        int64_t num_tokens = 0;
        for (int64_t i = 0; i < call.num_sequences; ++i) {
            first_token.push_back(num_tokens);
            first_block.push_back(num_blocks());
            num_tokens += call.lengths[i];
            sequence_of.insert(sequence_of.end(), (call.lengths[i] + kBlock - 1) / kBlock, i);
        }
        first_token.push_back(num_tokens);
        first_block.push_back(num_blocks());
        packs.reset(new uint32_t[num_packs * num_blocks() * call.num_kv_heads * pack_size()]);
        for (int64_t i = 0; i < call.num_sequences; ++i) {
            const int64_t prefix = call.prefix_of[i];
            const int64_t count = blocks_of(i) + (prefix < 0 ? 0 : blocks_of(prefix));
            most_seen = count > most_seen ? count : most_seen;
        }
        seen.reset(new LwzKeyBlock[call.num_threads * most_seen]);
    }

    int64_t num_blocks() const { return static_cast<int64_t>(sequence_of.size()); }
    int64_t blocks_of(int64_t i) const { return first_block[i + 1] - first_block[i]; }
    int64_t num_tokens() const { return first_token.back(); }
    int64_t pack_size() const { return kBlock / 2 * call.head_size; }
    int64_t group() const { return call.num_heads / call.num_kv_heads; }
    int64_t token(int64_t block) const {
        const int64_t i = sequence_of[block];
        return first_token[i] + (block - first_block[i]) * kBlock;
    }
    int count(int64_t block) const {
        const int64_t left = first_token[sequence_of[block] + 1] - token(block);
        return static_cast<int>(left < kBlock ? left : kBlock);
    }
    uint32_t* pack(int which, int64_t block, int64_t kv_head) const {
        const int64_t index = (which * num_blocks() + block) * call.num_kv_heads + kv_head;
        return packs.get() + index * pack_size();
    }
    uint16_t* at(const LwzRows& rows, int64_t block, int64_t head) const {
        return rows.data + token(block) * rows.token_stride + head * rows.head_stride;
    }
    LwzTokenRows rows(const LwzRows& of, int64_t block, int64_t head) const {
        return {at(of, block, head), of.token_stride, count(block)};
    }
    float* lse(int64_t block, int64_t head) const {
        return call.lse + head * num_tokens() + token(block);
    }

    // What a block of queries sees, in order, in this thread's part of `seen`; `make` turns a block
    // of keys into its entry. Returns how many there are.
    template <typename Make>
    int find_seen(int64_t block, LwzKeyBlock* keys, const Make& make) const {
        const int64_t i = sequence_of[block], prefix = call.prefix_of[i];
        int count = 0;
        for (int64_t b = prefix < 0 ? 0 : first_block[prefix];
             prefix >= 0 && b < first_block[prefix + 1]; ++b) {
            keys[count++] = make(b, false);
        }
        for (int64_t b = first_block[i]; b <= block; ++b) keys[count++] = make(b, b == block);
        return count;
    }
    LwzKeyBlock* thread_keys() const {
#if defined(_OPENMP)
        return seen.get() + omp_get_thread_num() * most_seen;
#else
        return seen.get();
#endif
    }
};

void pack_keys(const Plan& plan, int64_t block, int64_t head, bool is_backward) {
    const LwzTokenRows k = plan.rows(plan.call.k, block, head);
    const LwzTokenRows v = plan.rows(plan.call.v, block, head);
    const int head_size = static_cast<int>(plan.call.head_size);
    plan.kernel.pack_by_dim(k, head_size, plan.pack(kKByDim, block, head));
    if (is_backward) {
        plan.kernel.pack_by_dim(v, head_size, plan.pack(kVByDim, block, head));
        plan.kernel.pack_by_token(k, head_size, plan.pack(kKByToken, block, head));
    } else {
        plan.kernel.pack_by_token(v, head_size, plan.pack(kVByToken, block, head));
    }
}

void forward_block(const Plan& plan, int64_t block, int64_t head) {
    const int64_t kv_head = head / plan.group();
    LwzKeyBlock* keys = plan.thread_keys();
    const int num_seen = plan.find_seen(block, keys, [&](int64_t b, bool is_diagonal) {
        return LwzKeyBlock{plan.pack(kKByDim, b, kv_head), plan.pack(kVByToken, b, kv_head),
                           nullptr, nullptr, nullptr, nullptr, plan.count(b), is_diagonal};
    });
    const LwzAttentionCall& call = plan.call;
    plan.kernel.forward(plan.rows(call.q, block, head), keys, num_seen,
                        static_cast<int>(call.head_size), call.softmax_scale,
                        plan.at(call.out, block, head), call.out.token_stride,
                        plan.lse(block, head));
}

// Sums over queries, [num_blocks, num_heads, 2, block, head_size]: dk, then dv.
struct Sums {
    std::unique_ptr<float[]> data;
    int64_t num_heads, size;

    explicit Sums(const Plan& plan)
        : num_heads(plan.call.num_heads), size(kBlock * plan.call.head_size) {
        data.reset(new float[plan.num_blocks() * num_heads * 2 * size]);
    }
    float* dk(int64_t block, int64_t head) const {
        return data.get() + (block * num_heads + head) * 2 * size;
    }
    float* dv(int64_t block, int64_t head) const { return dk(block, head) + size; }
};

void backward_block(const Plan& plan, const Sums& sums, int64_t block, int64_t head) {
    const int64_t kv_head = head / plan.group();
    LwzKeyBlock* keys = plan.thread_keys();
    const int num_seen = plan.find_seen(block, keys, [&](int64_t b, bool is_diagonal) {
        return LwzKeyBlock{plan.pack(kKByDim, b, kv_head), nullptr, plan.pack(kVByDim, b, kv_head),
                           plan.pack(kKByToken, b, kv_head), sums.dk(b, head), sums.dv(b, head),
                           plan.count(b), is_diagonal};
    });
    const LwzAttentionCall& call = plan.call;
    plan.kernel.backward(plan.rows(call.q, block, head), plan.rows(call.out, block, head),
                         plan.rows(call.dout, block, head), keys, num_seen, static_cast<int>(call.head_size),
                         call.softmax_scale, plan.lse(block, head), plan.at(call.dq, block, head),
                         call.dq.token_stride);
}

// All sequences that see sequence `root`, itself among them.
void backward_family(const Plan& plan, const Sums& sums, int64_t root, int64_t head) {
    for (int64_t i = 0; i < plan.call.num_sequences; ++i) {
        if (i != root && plan.call.prefix_of[i] != root) continue;
        const int64_t begin = plan.first_block[i], end = plan.first_block[i + 1];
        for (int64_t block = begin; block < end; ++block) {
            std::memset(sums.dk(block, head), 0, 2 * sums.size * sizeof(float));
        }
    }
    for (int64_t i = 0; i < plan.call.num_sequences; ++i) {
        if (i != root && plan.call.prefix_of[i] != root) continue;
        const int64_t begin = plan.first_block[i], end = plan.first_block[i + 1];
        for (int64_t block = begin; block < end; ++block) backward_block(plan, sums, block, head);
    }
}

void write_sums(const Plan& plan, const Sums& sums, int64_t block, int64_t kv_head) {
    const LwzAttentionCall& call = plan.call;
    const int64_t head = kv_head * plan.group();
    const auto write = [&](const float* parts, const LwzRows& to) {
        plan.kernel.sum_parts(parts, 2 * sums.size, static_cast<int>(plan.group()),
                              plan.count(block), static_cast<int>(call.head_size),
                              plan.at(to, block, kv_head), to.token_stride);
    };
    write(sums.dk(block, head), call.dk);
    write(sums.dv(block, head), call.dv);
}

void run_forward(const LwzAttentionCall& call) {
    const Plan plan(call, 2);
    const int64_t num_packed = plan.num_blocks() * call.num_kv_heads;
    const int64_t num_items = plan.num_blocks() * call.num_heads;
#if defined(_OPENMP)
#pragma omp parallel num_threads(call.num_threads) if (call.num_threads > 1)
#endif
    {
#if defined(_OPENMP)
#pragma omp for
#endif
        for (int64_t i = 0; i < num_packed; ++i) {
            pack_keys(plan, i / call.num_kv_heads, i % call.num_kv_heads, false);
        }
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
        for (int64_t i = num_items - 1; i >= 0; --i) {
            forward_block(plan, i / call.num_heads, i % call.num_heads);
        }
    }
}

void run_backward(const LwzAttentionCall& call) {
    const Plan plan(call, kNumPacks);
    const Sums sums(plan);
    std::vector<int64_t> roots;
    for (int64_t i = 0; i < call.num_sequences; ++i) {
        if (call.prefix_of[i] < 0) roots.push_back(i);
    }
    const int64_t num_packed = plan.num_blocks() * call.num_kv_heads;
    const int64_t num_items = static_cast<int64_t>(roots.size()) * call.num_heads;
#if defined(_OPENMP)
#pragma omp parallel num_threads(call.num_threads) if (call.num_threads > 1)
#endif
    {
#if defined(_OPENMP)
#pragma omp for
#endif
        for (int64_t i = 0; i < num_packed; ++i) {
            pack_keys(plan, i / call.num_kv_heads, i % call.num_kv_heads, true);
        }
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
        for (int64_t i = 0; i < num_items; ++i) {
            backward_family(plan, sums, roots[i / call.num_heads], i % call.num_heads);
        }
#if defined(_OPENMP)
#pragma omp for
#endif
        for (int64_t i = 0; i < num_packed; ++i) {
            write_sums(plan, sums, i / call.num_kv_heads, i % call.num_kv_heads);
        }
    }
}

int check(const LwzAttentionCall& call) {
    if (call.level != kLwzAvx512Bf16 || lwz_best_level() < kLwzAvx512Bf16) {
        return kLwzUnsupportedLevel;
    }
    if (call.head_size < 1 || call.head_size % kAttentionHeadStep != 0 ||
        call.head_size > kAttentionMaxHead) {
        return kLwzUnsupportedHeadSize;
    }
    return kLwzOk;
}

int run(const LwzAttentionCall& call, void (*pass)(const LwzAttentionCall&)) {
    if (const int status = check(call)) return status;
    try {
        pass(call);
    } catch (const std::bad_alloc&) {
        return kLwzOutOfMemory;
    }
    return kLwzOk;
}

#endif  // LWZ_HAVE_X86_LEVELS

}  // namespace

#if defined(LWZ_HAVE_X86_LEVELS)
int lwz_attention(const LwzAttentionCall* call) { return run(*call, run_forward); }
int lwz_attention_backward(const LwzAttentionCall* call) { return run(*call, run_backward); }
#else
int lwz_attention(const LwzAttentionCall*) { return kLwzUnsupportedLevel; }
int lwz_attention_backward(const LwzAttentionCall*) { return kLwzUnsupportedLevel; }
#endif
