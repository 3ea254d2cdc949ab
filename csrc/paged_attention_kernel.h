// What the driver (paged_attention.cpp) and the kernels (paged_attention_kernel.cpp, compiled once
// per instruction set) share.
#ifndef LWZ_PAGED_ATTENTION_KERNEL_H
#define LWZ_PAGED_ATTENTION_KERNEL_H

#include <cstdint>

// Head sizes are multiples of 8 up to this: the narrowest vector has 8 lanes.
constexpr int64_t kHeadSizeStep = 8;
constexpr int64_t kMaxHeadSize = 512;

// One range of keys of one sequence, for one or more neighbouring KV heads and the `group` query
// heads that share each. Query heads of a KV head are neighbours too: heads = num_kv_heads * group.
struct LwzChunk {
    const void* q;             // [heads, head_size]
    const void* k_cache;       // first element of the first KV head in page 0
    const void* v_cache;
    const int32_t* pages;      // page table row of this sequence
    int64_t page_size;
    int64_t row_stride;        // elements between two keys of a page
    int64_t page_stride;       // elements between two pages
    int64_t key_begin;
    int64_t key_end;
    int64_t num_kv_heads;
    int64_t group;
    int64_t head_size;
    float softmax_scale;
    int dtype;
    float* acc;                // [heads, head_size]: sum of exp(score - max) * v, overwritten
    float* row_max;            // [heads], overwritten
    float* row_sum;            // [heads], overwritten
};

// `lanes` floats are processed at once: a level can run head sizes that are multiples of it.
struct LwzKernel {
    int lanes;
    // `next` is the chunk that the thread attends to afterwards, or one without keys.
    void (*attend)(const LwzChunk& chunk, const LwzChunk& next);
    void (*vector_exp)(const float* x, float* out, int64_t count);
};

LwzKernel lwz_kernel_generic();
#if defined(LWZ_HAVE_X86_LEVELS)
LwzKernel lwz_kernel_avx2();
LwzKernel lwz_kernel_avx512();
LwzKernel lwz_kernel_avx512_bf16();
#endif

#endif  // LWZ_PAGED_ATTENTION_KERNEL_H
