// The layers of a Llama-family decoder for one new token of each sequence.
//
// Six steps a layer, each on all threads: norm and query-key-value projection; rotation and storing
// of keys; attention; output projection onto the residual; norm and gate-up projection; gate and
// down projection onto the residual. Called one by one, steps this short cost as much again in
// their callers.
#include "decode_layers.h"

#include <memory>
#include <new>

#include "bfloat16.h"
#include "linear.h"
#include "linear_kernel.h"
#include "paged_attention.h"

namespace {

float value_of(float x) { return x; }
float value_of(uint16_t x) { return bf16_to_float(x); }

template <typename T>
T rounded(float x);
template <>
float rounded<float>(float x) {
    return x;
}
template <>
uint16_t rounded<uint16_t>(float x) {
    return float_to_bf16(x);
}

// What a layer needs until the next one.
struct Scratch {
    std::unique_ptr<char[]> qkv;       // [batch, num_heads + 2 * num_kv_heads, head_size]
    std::unique_ptr<char[]> q;         // [batch, num_heads, head_size], rotated
    std::unique_ptr<char[]> attended;  // as q
    std::unique_ptr<char[]> gate_up;   // [batch, 2 * ff]

    explicit Scratch(const LwzDecodeLayersCall& c) {
        const int64_t row_bytes = c.batch * (c.dtype == kLwzBFloat16 ? 2 : 4);
        const int64_t head_bytes = row_bytes * c.head_size;
        qkv.reset(new char[head_bytes * (c.num_heads + 2 * c.num_kv_heads)]);
        q.reset(new char[head_bytes * c.num_heads]);
        attended.reset(new char[head_bytes * c.num_heads]);
        gate_up.reset(new char[row_bytes * 2 * c.ff]);
    }
};

LwzLinearCall linear_call(const LwzDecodeLayersCall& c, const void* x, const void* weight,
                          void* out, int64_t num_columns, int64_t depth) {
    return {x,       weight,  nullptr, out,     c.batch, num_columns,
            depth,   c.dtype, c.dtype, c.dtype, c.level, c.num_threads};
}

int project_normed(const LwzDecodeLayersCall& c, const void* norm, const void* weight,
                   const void* bias, void* out, int64_t num_columns) {
    LwzLinearCall call = linear_call(c, c.x, weight, out, num_columns, c.hidden);
    call.bias = bias;
    call.input = kLwzRmsNorm;
    call.norm_weight = norm;
    call.norm_eps = c.norm_eps;
    return lwz_run_linear(call);
}

int add_projection(const LwzDecodeLayersCall& c, const void* x, int input, const void* weight,
                   int64_t depth) {
    LwzLinearCall call = linear_call(c, x, weight, c.x, c.hidden, depth);
    call.input = input;
    call.residual = c.x;
    return lwz_run_linear(call);
}

// head / sqrt(mean(head^2) + eps), rounded, times weight, rounded.
template <typename T>
void normalize(const LwzDecodeLayersCall& c, const T* weight, T* head) {
    float sum = 0.0f;
    for (int64_t i = 0; i < c.head_size; ++i) sum += value_of(head[i]) * value_of(head[i]);
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(c.head_size) + c.norm_eps);
    for (int64_t i = 0; i < c.head_size; ++i) {
        const float normed = value_of(rounded<T>(value_of(head[i]) * scale));
        head[i] = rounded<T>(normed * value_of(weight[i]));
    }
}

template <typename T>
void rotate(const LwzDecodeLayersCall& c, const T* head, const T* cos, const T* sin, T* out) {
    const int64_t half = c.head_size / 2;
    for (int64_t i = 0; i < c.head_size; ++i) {
        const float other = value_of(head[i < half ? i + half : i - half]);
        const float first = value_of(rounded<T>(value_of(head[i]) * value_of(cos[i])));
        out[i] = rounded<T>(first + other * value_of(sin[i]));
    }
}

// Row b of qkv: queries go to `q`, keys and values to their slot.
template <typename T>
void place_row(const LwzDecodeLayersCall& c, const LwzDecodeLayer& layer, T* qkv, T* q, int64_t b) {
    const int64_t heads = c.num_heads, kv_heads = c.num_kv_heads, size = c.head_size;
    const T* cos = static_cast<const T*>(c.cos) + b * size;
    const T* sin = static_cast<const T*>(c.sin) + b * size;
    T* row = qkv + b * (heads + 2 * kv_heads) * size;
    const bool is_stored = c.slots[b] >= 0;
    T* const k = static_cast<T*>(layer.k_cache) + c.slots[b] * kv_heads * size;
    for (int64_t h = 0; h < heads + (is_stored ? kv_heads : 0); ++h) {
        T* const head = row + h * size;
        if (layer.q_norm != nullptr) {
            normalize(c, static_cast<const T*>(h < heads ? layer.q_norm : layer.k_norm), head);
        }
        rotate(c, head, cos, sin, h < heads ? q + (b * heads + h) * size : k + (h - heads) * size);
    }
    if (is_stored) {
        std::memcpy(static_cast<T*>(layer.v_cache) + c.slots[b] * kv_heads * size,
                    row + (heads + kv_heads) * size, kv_heads * size * sizeof(T));
    }
}

template <typename T>
void place(const LwzDecodeLayersCall& c, const LwzDecodeLayer& layer, Scratch& scratch) {
    T* const qkv = reinterpret_cast<T*>(scratch.qkv.get());
    T* const q = reinterpret_cast<T*>(scratch.q.get());
#if defined(_OPENMP)
#pragma omp parallel for num_threads(c.num_threads) if (c.num_threads > 1 && c.batch > 1)
#endif
    for (int64_t b = 0; b < c.batch; ++b) place_row(c, layer, qkv, q, b);
}

int attend(const LwzDecodeLayersCall& c, const LwzDecodeLayer& layer, Scratch& scratch) {
    if (c.dtype == kLwzBFloat16) {
        place<uint16_t>(c, layer, scratch);
    } else {
        place<float>(c, layer, scratch);
    }
    return lwz_paged_attention(scratch.q.get(), layer.k_cache, layer.v_cache, c.page_table,
                               c.context_lens, scratch.attended.get(), c.batch, c.num_heads,
                               c.num_kv_heads, c.head_size, c.num_pages, c.page_size, c.max_pages,
                               c.softmax_scale, c.dtype, c.level, c.num_threads);
}

int run_layer(const LwzDecodeLayersCall& c, const LwzDecodeLayer& layer, Scratch& scratch) {
    const int64_t q_size = c.num_heads * c.head_size;
    const int64_t qkv_size = q_size + 2 * c.num_kv_heads * c.head_size;
    if (const int status = project_normed(c, layer.attn_norm, layer.qkv_proj, layer.qkv_bias,
                                          scratch.qkv.get(), qkv_size)) {
        return status;
    }
    if (const int status = attend(c, layer, scratch)) return status;
    if (const int status =
            add_projection(c, scratch.attended.get(), kLwzPlain, layer.o_proj, q_size)) {
        return status;
    }
    if (const int status = project_normed(c, layer.mlp_norm, layer.gate_up_proj, nullptr,
                                          scratch.gate_up.get(), 2 * c.ff)) {
        return status;
    }
    return add_projection(c, scratch.gate_up.get(), kLwzSiluGate, layer.down_proj, c.ff);
}

int check(const LwzDecodeLayersCall& c) {
    if (c.hidden % kDepthStep != 0 || c.ff % kDepthStep != 0) return kLwzUnsupportedDepth;
    for (int64_t b = 0; b < c.batch; ++b) {
        if (c.slots[b] >= c.num_pages * c.page_size) return kLwzSlotOutOfRange;
    }
    return lwz_check_contexts(c.page_table, c.context_lens, c.batch, c.num_pages, c.page_size,
                              c.max_pages);
}

}  // namespace

int lwz_decode_layers(const LwzDecodeLayersCall* call) {
    if (const int status = check(*call)) return status;
    try {
        Scratch scratch(*call);
        for (int64_t i = 0; i < call->num_layers; ++i) {
            if (const int status = run_layer(*call, call->layers[i], scratch)) return status;
        }
    } catch (const std::bad_alloc&) {
        return kLwzOutOfMemory;
    }
    return kLwzOk;
}
