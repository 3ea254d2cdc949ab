// What the driver (attention.cpp) and the kernel (attention_kernel.cpp) share.
//
// Keys and values are repacked once per call, kAttentionBlock tokens of a KV head at a time, so that
// every product is a broadcast pair of bf16 times a vector of pairs.
#ifndef LWZ_ATTENTION_KERNEL_H
#define LWZ_ATTENTION_KERNEL_H

#include <cstdint>

constexpr int kAttentionBlock = 64;
constexpr int kAttentionHeadStep = 64;
constexpr int kAttentionMaxHead = 256;

// A block of tokens of one head: rows of bf16.
struct LwzTokenRows {
    const uint16_t* data;
    int64_t stride;
    int count;
};

// What queries see of a block of keys. Packs hold head_size * kAttentionBlock / 2 pairs.
struct LwzKeyBlock {
    const uint32_t* k_by_dim;    // [head_size / 2, block]: two neighbours along the head
    const uint32_t* v_by_token;  // [block / 2, head_size]: two neighbouring tokens; forward only
    const uint32_t* v_by_dim;    // backward only
    const uint32_t* k_by_token;  // backward only
    float* dk;                   // [block, head_size], added to; backward only
    float* dv;
    int count;         // keys
    bool is_diagonal;  // query i of the block sees the keys up to i; else all
};

struct LwzAttentionKernel {
    void (*pack_by_dim)(const LwzTokenRows& rows, int head_size, uint32_t* pack);
    void (*pack_by_token)(const LwzTokenRows& rows, int head_size, uint32_t* pack);
    void (*forward)(const LwzTokenRows& q, const LwzKeyBlock* keys, int num_blocks, int head_size,
                    float scale, uint16_t* out, int64_t out_stride, float* lse);
    void (*backward)(const LwzTokenRows& q, const LwzTokenRows& out, const LwzTokenRows& dout,
                     const LwzKeyBlock* keys, int num_blocks, int head_size, float scale,
                     const float* lse, uint16_t* dq, int64_t dq_stride);
    // to = sum of `count` parts, each [rows, head_size] and `part_stride` apart.
    void (*sum_parts)(const float* parts, int64_t part_stride, int count, int rows, int head_size,
                      uint16_t* to, int64_t to_stride);
};

#if defined(LWZ_HAVE_X86_LEVELS)
LwzAttentionKernel lwz_attention_avx512_bf16();
#endif

#endif  // LWZ_ATTENTION_KERNEL_H
