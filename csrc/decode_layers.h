// The C interface of the native decoder layers: one new token of each sequence through all of them.
#ifndef LWZ_DECODE_LAYERS_H
#define LWZ_DECODE_LAYERS_H

#include "interface.h"

// Weights [out, in] and the caches of a layer; null where the model has no such part.
struct LwzDecodeLayer {
    const void* attn_norm;     // [hidden]
    const void* qkv_proj;      // [(num_heads + 2 * num_kv_heads) * head_size, hidden]
    const void* o_proj;        // [hidden, num_heads * head_size]
    const void* mlp_norm;      // [hidden]
    const void* gate_up_proj;  // [2 * ff, hidden]
    const void* down_proj;     // [hidden, ff]
    const void* qkv_bias;      // one of each row of qkv_proj, or null
    const void* q_norm;        // [head_size], or null with k_norm
    const void* k_norm;
    void* k_cache;  // [num_pages, page_size, num_kv_heads, head_size]
    void* v_cache;
};

struct LwzDecodeLayersCall {
    const LwzDecodeLayer* layers;
    void* x;          // [batch, hidden]: the residual stream, changed in place
    const void* cos;  // [batch, head_size]
    const void* sin;  // [batch, head_size], negative in the first half
    const int32_t* page_table;    // [batch, max_pages]
    const int32_t* context_lens;  // [batch], the new token included
    const int64_t* slots;         // [batch], where the new token goes; negative: nowhere
    int64_t num_layers, batch, hidden, num_heads, num_kv_heads, head_size, ff;
    int64_t num_pages, page_size, max_pages;
    float norm_eps, softmax_scale;
    int dtype, level, num_threads;
};

// Everything contiguous and of one dtype. Every operation is rounded as the decoder rounds it.
// Slots and pages are checked before anything is written.
LWZ_EXPORT int lwz_decode_layers(const LwzDecodeLayersCall* call);

#endif  // LWZ_DECODE_LAYERS_H
