// The C interface of phase memory: objects, statuses, and messages.
#include "phase_memory.h"

#include <string>

#include "phase_memory_arena.h"

namespace lwz {
namespace {

thread_local std::string last_error;

}  // namespace

void set_error(const char* message) { last_error = message; }

}  // namespace lwz

int lwz_memory_abi_version() { return kLwzMemoryAbiVersion; }

const char* lwz_memory_error() { return lwz::last_error.c_str(); }

int lwz_memory_open_cpu(int64_t page_bytes, int64_t capacity_bytes, LwzMemory** memory) {
    return lwz::guarded([&] {
        *memory = new LwzMemory{{lwz::open_cpu_backend(), page_bytes, capacity_bytes}};
    });
}

int lwz_memory_open_cuda(const char* driver, int device, int64_t page_bytes,
                         int64_t capacity_bytes, LwzMemory** memory) {
    return lwz::guarded([&] {
        *memory = new LwzMemory{
            {lwz::open_cuda_backend(driver, device), page_bytes, capacity_bytes}};
    });
}

int lwz_memory_close(LwzMemory* memory, int keep_addresses) {
    lwz::unbind_allocators(memory);
    const int status = lwz::guarded([&] { memory->arena.close(keep_addresses != 0); });
    delete memory;
    return status;
}

int lwz_memory_reserve(LwzMemory* memory, int64_t num_pages, int64_t* region, uint64_t* address) {
    return lwz::guarded([&] { *region = memory->arena.reserve(num_pages, address); });
}

int lwz_memory_unreserve(LwzMemory* memory, int64_t region) {
    return lwz::guarded([&] { memory->arena.unreserve(region); });
}

int lwz_memory_apply(LwzMemory* memory, const LwzMemoryMove* moves, int64_t num_moves) {
    return lwz::guarded([&] { memory->arena.apply(moves, num_moves); });
}

int lwz_memory_release_free(LwzMemory* memory, int64_t keep, int64_t* released) {
    return lwz::guarded([&] { *released = memory->arena.release_free(keep); });
}

int lwz_memory_page_table(LwzMemory* memory, int64_t region, int64_t* out) {
    return lwz::guarded([&] { memory->arena.page_table(region, out); });
}

int lwz_memory_stats(LwzMemory* memory, LwzMemoryStats* out) {
    return lwz::guarded([&] { *out = memory->arena.stats(); });
}

int lwz_memory_device_free_bytes(LwzMemory* memory, int64_t* out) {
    return lwz::guarded([&] { *out = memory->arena.device_free_bytes(); });
}
