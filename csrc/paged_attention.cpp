// The driver of native paged attention: checks, work splitting, threads, and the final merge.
//
// Every sequence is cut into chunks of kChunkKeys keys, whatever the batch and the number of
// threads. So one long sequence keeps all cores busy, ragged batches balance, and a sequence's
// result does not change by a bit with its neighbours in the batch or with the thread count.
#include "paged_attention.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bfloat16.h"
#include "paged_attention_kernel.h"

namespace {

constexpr int64_t kChunkKeys = 256;

struct Problem {
    const void* q;
    const void* k_cache;
    const void* v_cache;
    const int32_t* page_table;
    const int32_t* context_lens;
    void* out;
    int64_t batch, num_heads, num_kv_heads, head_size, page_size, max_pages;
    float softmax_scale;
    int dtype;

    int64_t group() const { return num_heads / num_kv_heads; }
};

LwzKernel kernel_of(int level) {
#if defined(LWZ_HAVE_X86_LEVELS)
    if (level == kLwzAvx512Bf16) return lwz_kernel_avx512_bf16();
    if (level == kLwzAvx512) return lwz_kernel_avx512();
    if (level == kLwzAvx2) return lwz_kernel_avx2();
#endif
    (void)level;
    return lwz_kernel_generic();
}

// The widest allowed kernel whose vectors divide the head size; 8 lanes always do.
LwzKernel kernel_for_head_size(int level, int64_t head_size) {
    LwzKernel kernel = kernel_of(level);
    while (head_size % kernel.lanes != 0) kernel = kernel_of(--level);
    return kernel;
}

int check(const Problem& p, int64_t num_pages, int level) {
    if (p.head_size % kHeadSizeStep != 0 || p.head_size < 1 || p.head_size > kMaxHeadSize) {
        return kLwzUnsupportedHeadSize;
    }
    if (level < kLwzGeneric || level > lwz_best_level()) return kLwzUnsupportedLevel;
    return lwz_check_contexts(p.page_table, p.context_lens, p.batch, num_pages, p.page_size,
                              p.max_pages);
}

// Which chunks there are, and where the partial results of each live.
struct Plan {
    std::vector<int64_t> first_chunk;  // [batch + 1]: chunks of row b are first_chunk[b .. b + 1]
    std::vector<int64_t> chunk_row;    // [num_chunks]
    std::unique_ptr<float[]> acc;      // [num_chunks, num_heads, head_size]
    std::unique_ptr<float[]> row_max;  // [num_chunks, num_heads]
    std::unique_ptr<float[]> row_sum;  // [num_chunks, num_heads]

    explicit Plan(const Problem& p) : first_chunk(p.batch + 1, 0) {
        for (int64_t b = 0; b < p.batch; ++b) {
            const int64_t count = (p.context_lens[b] + kChunkKeys - 1) / kChunkKeys;
            first_chunk[b + 1] = first_chunk[b] + count;
            chunk_row.insert(chunk_row.end(), count, b);
        }
        const int64_t rows = num_chunks() * p.num_heads;
        acc.reset(new float[rows * p.head_size]);
        row_max.reset(new float[rows]);
        row_sum.reset(new float[rows]);
    }

    int64_t num_chunks() const { return static_cast<int64_t>(chunk_row.size()); }
};

const void* offset_elements(const void* base, int64_t count, int dtype) {
    return static_cast<const char*>(base) + count * (dtype == kLwzBFloat16 ? 2 : 4);
}

// KV heads of one work item. The rows of a page are read fastest as a whole, all heads at once;
// they are split only where whole rows would leave threads idle. Results do not depend on it.
int64_t kv_heads_per_item(const Problem& p, const Plan& plan, int num_threads) {
    constexpr int64_t kItemsPerThread = 4;
    int64_t heads = p.num_kv_heads;
    while (heads > 1 && plan.num_chunks() * (p.num_kv_heads / heads) <
                            kItemsPerThread * num_threads) {
        do {
            --heads;
        } while (p.num_kv_heads % heads != 0);
    }
    return heads;
}

LwzChunk chunk_at(const Problem& p, const Plan& plan, int64_t chunk_index, int64_t kv_head,
                  int64_t num_kv_heads) {
    const int64_t b = plan.chunk_row[chunk_index];
    const int64_t head = kv_head * p.group();
    const int64_t partial = chunk_index * p.num_heads + head;
    LwzChunk chunk;
    chunk.q = offset_elements(p.q, (b * p.num_heads + head) * p.head_size, p.dtype);
    chunk.k_cache = offset_elements(p.k_cache, kv_head * p.head_size, p.dtype);
    chunk.v_cache = offset_elements(p.v_cache, kv_head * p.head_size, p.dtype);
    chunk.pages = p.page_table + b * p.max_pages;
    chunk.page_size = p.page_size;
    chunk.row_stride = p.num_kv_heads * p.head_size;
    chunk.page_stride = p.page_size * chunk.row_stride;
    chunk.key_begin = (chunk_index - plan.first_chunk[b]) * kChunkKeys;
    const int64_t length = p.context_lens[b];
    chunk.key_end = chunk.key_begin + kChunkKeys < length ? chunk.key_begin + kChunkKeys : length;
    chunk.num_kv_heads = num_kv_heads;
    chunk.group = p.group();
    chunk.head_size = p.head_size;
    chunk.softmax_scale = p.softmax_scale;
    chunk.dtype = p.dtype;
    chunk.acc = plan.acc.get() + partial * p.head_size;
    chunk.row_max = plan.row_max.get() + partial;
    chunk.row_sum = plan.row_sum.get() + partial;
    return chunk;
}

void write_output(const Problem& p, int64_t row, const float* values) {
    for (int64_t d = 0; d < p.head_size; ++d) {
        if (p.dtype == kLwzBFloat16) {
            static_cast<uint16_t*>(p.out)[row * p.head_size + d] = float_to_bf16(values[d]);
        } else {
            static_cast<float*>(p.out)[row * p.head_size + d] = values[d];
        }
    }
}

// out = sum_c exp(max_c - max) acc_c / sum_c exp(max_c - max) sum_c, over the chunks c of a row.
void merge_row(const Problem& p, const Plan& plan, int64_t b, int64_t head) {
    float merged[kMaxHeadSize] = {};
    const int64_t begin = plan.first_chunk[b], end = plan.first_chunk[b + 1];
    float max = -INFINITY;
    for (int64_t c = begin; c < end; ++c) {
        const float chunk_max = plan.row_max[c * p.num_heads + head];
        max = chunk_max > max ? chunk_max : max;
    }
    float sum = 0.0f;
    for (int64_t c = begin; c < end; ++c) {
        const int64_t partial = c * p.num_heads + head;
        const float weight = std::exp(plan.row_max[partial] - max);
        sum += weight * plan.row_sum[partial];
        const float* acc = plan.acc.get() + partial * p.head_size;
        for (int64_t d = 0; d < p.head_size; ++d) merged[d] += weight * acc[d];
    }
    if (begin < end) {
        for (int64_t d = 0; d < p.head_size; ++d) merged[d] /= sum;
    }
    write_output(p, b * p.num_heads + head, merged);
}

void run(const Problem& p, Plan& plan, const LwzKernel& kernel, int num_threads) {
    const int64_t item_heads = kv_heads_per_item(p, plan, num_threads);
    const int64_t items_per_chunk = p.num_kv_heads / item_heads;
    const int64_t num_items = plan.num_chunks() * items_per_chunk;
    const int64_t num_rows = p.batch * p.num_heads;
    std::atomic<int64_t> next_item{0};
#if defined(_OPENMP)
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_items > 1)
#endif
    {
        // A thread takes its next item before it works on the present one, so that the kernel can
        // fetch across the border.
        const auto take = [&] {
            const int64_t item = next_item.fetch_add(1);
            if (item >= num_items) return LwzChunk{};
            return chunk_at(p, plan, item / items_per_chunk, item % items_per_chunk * item_heads,
                            item_heads);
        };
        for (LwzChunk chunk = take(); chunk.key_end > 0;) {
            const LwzChunk next = take();
            kernel.attend(chunk, next);
            chunk = next;
        }
#if defined(_OPENMP)
#pragma omp barrier
#pragma omp for
#endif
        for (int64_t row = 0; row < num_rows; ++row) {
            merge_row(p, plan, row / p.num_heads, row % p.num_heads);
        }
    }
}

}  // namespace

int lwz_check_contexts(const int32_t* page_table, const int32_t* context_lens, int64_t batch,
                       int64_t num_pages, int64_t page_size, int64_t max_pages) {
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t length = context_lens[b];
        if (length < 0 || length > max_pages * page_size) return kLwzContextTooLong;
        const int64_t used_pages = (length + page_size - 1) / page_size;
        for (int64_t i = 0; i < used_pages; ++i) {
            const int32_t page = page_table[b * max_pages + i];
            if (page < 0 || page >= num_pages) return kLwzPageOutOfRange;
        }
    }
    return kLwzOk;
}

int lwz_paged_attention(const void* q, const void* k_cache, const void* v_cache,
                        const int32_t* page_table, const int32_t* context_lens, void* out,
                        int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t head_size,
                        int64_t num_pages, int64_t page_size, int64_t max_pages,
                        float softmax_scale, int dtype, int level, int num_threads) {
    const Problem problem{q,         k_cache,       v_cache,      page_table, context_lens, out,
                          batch,     num_heads,     num_kv_heads, head_size,  page_size,
                          max_pages, softmax_scale, dtype};
    if (const int status = check(problem, num_pages, level)) return status;
    try {
        Plan plan(problem);
        run(problem, plan, kernel_for_head_size(level, head_size), num_threads);
    } catch (const std::bad_alloc&) {
        return kLwzOutOfMemory;
    }
    return kLwzOk;
}

int lwz_store_kv(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots,
                 int64_t num_tokens, int64_t num_slots, int64_t row_bytes, int num_threads) {
    for (int64_t t = 0; t < num_tokens; ++t) {
        if (slots[t] >= num_slots) return kLwzSlotOutOfRange;
    }
    // A thread's start-up costs more than copying this much.
    constexpr int64_t kBytesWorthThreads = 1 << 20;
    const bool is_large = num_tokens * row_bytes > kBytesWorthThreads;
    (void)is_large;
    (void)num_threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && is_large)
#endif
    for (int64_t t = 0; t < num_tokens; ++t) {
        if (slots[t] < 0) continue;
        std::memcpy(static_cast<char*>(k_cache) + slots[t] * row_bytes,
                    static_cast<const char*>(k) + t * row_bytes, row_bytes);
        std::memcpy(static_cast<char*>(v_cache) + slots[t] * row_bytes,
                    static_cast<const char*>(v) + t * row_bytes, row_bytes);
    }
    return kLwzOk;
}

int lwz_vector_exp(const float* x, float* out, int64_t count, int level) {
    if (level < kLwzGeneric || level > lwz_best_level()) return kLwzUnsupportedLevel;
    kernel_of(level).vector_exp(x, out, count);
    return kLwzOk;
}
