// The C interface of the native paged attention: plain C++17, no torch header, called by ctypes.
//
// Conventions: K/V caches are [num_pages, page_size, num_kv_heads, head_size], contiguous; scores
// are natural-log; all arithmetic is fp32; `out` is overwritten; nothing is kept between calls.
// Every function that returns int returns one of LwzStatus.
#ifndef LWZ_PAGED_ATTENTION_H
#define LWZ_PAGED_ATTENTION_H

#include "interface.h"

// out[b, h] = softmax(scale * q[b, h] . K_b) V_b over the first context_lens[b] keys of row b;
// zeros where context_lens[b] is 0. `level` is the widest instruction set that may be used.
LWZ_EXPORT int lwz_paged_attention(const void* q, const void* k_cache, const void* v_cache,
                                   const int32_t* page_table, const int32_t* context_lens,
                                   void* out, int64_t batch, int64_t num_heads,
                                   int64_t num_kv_heads, int64_t head_size, int64_t num_pages,
                                   int64_t page_size, int64_t max_pages, float softmax_scale,
                                   int dtype, int level, int num_threads);

// Whether all contexts are within their tables and name pages that exist; for the library's own use.
int lwz_check_contexts(const int32_t* page_table, const int32_t* context_lens, int64_t batch,
                       int64_t num_pages, int64_t page_size, int64_t max_pages);

// Copies row t of k and v ([num_tokens, row_bytes]) to cache row slots[t]; skips negative slots.
// All slots are checked before the first write.
LWZ_EXPORT int lwz_store_kv(const void* k, const void* v, void* k_cache, void* v_cache,
                            const int64_t* slots, int64_t num_tokens, int64_t num_slots,
                            int64_t row_bytes, int num_threads);

// out[i] = exp(x[i]) for x <= 0 as the kernel computes it; `count` is a multiple of 16. For tests.
LWZ_EXPORT int lwz_vector_exp(const float* x, float* out, int64_t count, int level);

#endif  // LWZ_PAGED_ATTENTION_H
