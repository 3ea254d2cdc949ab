// Causal attention of packed bf16 sequences, and its gradients, for processors that multiply pairs
// of bf16 (kLwzAvx512Bf16).
//
// Query i of a sequence of length n sees the keys 0..i of its sequence, and before them all keys of
// the sequence that is its prefix, if it has one. With s = softmax_scale * (q . k):
//   lse = log sum exp(s),  p = exp(s - lse),  out = sum p v
//   ds = p (dout . v - dout . out),  dq = scale sum ds k,  dk = scale sum ds q,  dv = sum p dout
// Scores, sums and gradients accumulate in fp32; p and ds are rounded to bf16 as factors. The bits
// of a result depend on neither the number of threads nor other sequences.
#ifndef LWZ_ATTENTION_H
#define LWZ_ATTENTION_H

#include <cstdint>

#include "interface.h"

// [tokens, heads, head_size] with head_size contiguous; strides in elements, even numbers.
struct LwzRows {
    uint16_t* data;
    int64_t token_stride, head_stride;
};

struct LwzAttentionCall {
    LwzRows q, k, v, out;
    LwzRows dout, dq, dk, dv;   // backward only
    float* lse;                 // [num_heads, num_tokens]
    const int64_t* lengths;     // [num_sequences], one after another
    const int64_t* prefix_of;   // [num_sequences]; -1: none; a prefix has no prefix itself
    int64_t num_sequences, num_heads, num_kv_heads, head_size;
    float softmax_scale;
    int level, num_threads;
};

// Writes out and lse. head_size is a multiple of 64, at most 256.
LWZ_EXPORT int lwz_attention(const LwzAttentionCall* call);

// Writes dq, dk and dv from out, lse and dout.
LWZ_EXPORT int lwz_attention_backward(const LwzAttentionCall* call);

#endif  // LWZ_ATTENTION_H
