// The driver of the native linear layer: checks and threads.
//
// The weight is read once, in chunks of columns that threads take in turn. A thread takes its next
// chunk before it works on the present one, so that the kernel can prefetch across the border.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "linear_kernel.h"

namespace {

// A multiple of every tile's columns, so that only the last chunk has a ragged tile.
constexpr int64_t kColumnStep = 24;
constexpr int64_t kMaxChunkColumns = 48;

struct FreeAligned {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], FreeAligned>;

Floats allocate(int64_t count) {
    return Floats(static_cast<float*>(::operator new[](count * sizeof(float),
                                                       std::align_val_t{64})));
}

LwzLinearKernel kernel_of(int level) {
#if defined(LWZ_HAVE_X86_LEVELS)
    if (level == kLwzAvx512Bf16) return lwz_linear_avx512_bf16();
    if (level == kLwzAvx512) return lwz_linear_avx512();
    if (level == kLwzAvx2) return lwz_linear_avx2();
#endif
    (void)level;
    return lwz_linear_generic();
}

int64_t chunk_columns(int64_t num_columns, int num_threads) {
    constexpr int64_t kChunksPerThread = 4;
    const int64_t share = num_columns / (kChunksPerThread * num_threads);
    return std::clamp(share / kColumnStep * kColumnStep, kColumnStep, kMaxChunkColumns);
}

void run(const LwzLinear& linear, const LwzLinearKernel& kernel) {
    const int num_threads = linear.num_threads;
    const int64_t columns = chunk_columns(linear.num_columns, num_threads);
    const int64_t num_chunks = (linear.num_columns + columns - 1) / columns;
    const int64_t acc_size = columns * linear.num_vecs * kernel.lanes;
    const Floats acc_of_threads = allocate(num_threads * acc_size);
    std::atomic<int64_t> next_chunk{0};
    std::atomic<int> next_thread{0};
#if defined(_OPENMP)
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_chunks > 1)
#endif
    {
#if defined(_OPENMP)
#pragma omp for
#endif
        for (int64_t vec = 0; vec < linear.num_vecs; ++vec) kernel.pack(linear, vec);
        float* const acc = acc_of_threads.get() + next_thread.fetch_add(1) * acc_size;
        int64_t chunk = next_chunk.fetch_add(1);
        while (chunk < num_chunks) {
            const int64_t next = next_chunk.fetch_add(1);
            const int64_t begin = chunk * columns;
            const int64_t end = std::min(begin + columns, linear.num_columns);
            kernel.accumulate(linear, begin, end, next < num_chunks ? next * columns : begin, acc);
            kernel.write(linear, begin, end, acc);
            chunk = next;
        }
    }
}

}  // namespace

int lwz_run_linear(const LwzLinearCall& call) {
    if (call.depth < 1 || call.depth % kDepthStep != 0) return kLwzUnsupportedDepth;
    if (call.level < kLwzGeneric || call.level > lwz_best_level()) return kLwzUnsupportedLevel;
    if (call.num_rows == 0 || call.num_columns == 0) return kLwzOk;
    const LwzLinearKernel kernel = kernel_of(call.level);
    const int64_t num_vecs = (call.num_rows + kernel.lanes - 1) / kernel.lanes;
    try {
        const Floats packed_x = allocate(num_vecs * call.depth * kernel.lanes);
        run(LwzLinear{call, packed_x.get(), num_vecs}, kernel);
    } catch (const std::bad_alloc&) {
        return kLwzOutOfMemory;
    }
    return kLwzOk;
}

int lwz_linear(const void* x, const void* weight, const void* bias, void* out, int64_t num_rows,
               int64_t num_columns, int64_t depth, int x_dtype, int weight_dtype, int out_dtype,
               int level, int num_threads) {
    return lwz_run_linear({x, weight, bias, out, num_rows, num_columns, depth, x_dtype,
                           weight_dtype, out_dtype, level, num_threads});
}
