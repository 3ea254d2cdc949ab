// A torch allocator inside a region: first fit over mapped pages, one region a device.
//
// torch passes its functions no context, hence the table of bindings. Blocks are bookkeeping about
// addresses only: a phase switch takes the pages from under them and brings them back.
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "phase_memory_arena.h"

namespace lwz {
namespace {

constexpr int64_t kAlignment = 512;  // what torch's caching allocator expects of its segments

struct Binding {
    LwzMemory* memory = nullptr;
    int64_t region = 0;
    uint64_t address = 0;
    int64_t bytes = 0;
    int64_t end = 0;
    std::map<int64_t, int64_t> blocks;  // offset in the region -> bytes, multiples of kAlignment
};

std::mutex mutex;
std::map<int, Binding> bindings;

int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The first offset of a gap of `bytes` mapped bytes, or -1.
int64_t first_fit(const Binding& binding, int64_t bytes) {
    int64_t offset = 0;
    auto block = binding.blocks.begin();
    while (true) {
        const bool is_last = block == binding.blocks.end();
        const int64_t gap_end = is_last ? binding.bytes : block->first;
        while (bytes <= gap_end - offset) {
            const int64_t hole_end =
                binding.memory->arena.end_of_hole(binding.region, offset, bytes);
            if (hole_end == 0) return offset;
            offset = hole_end;
        }
        if (is_last) return -1;
        offset = block->first + block->second;
        ++block;
    }
}

Binding& binding_of(int device) {
    const auto found = bindings.find(device);
    if (found == bindings.end()) {
        throw MemoryFailure(kLwzMemoryInvalid,
                            "no region is bound to device " + std::to_string(device));
    }
    return found->second;
}

}  // namespace

void unbind_allocators(const LwzMemory* memory) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto binding = bindings.begin(); binding != bindings.end();) {
        const bool is_ours = binding->second.memory == memory;
        binding = is_ours ? bindings.erase(binding) : std::next(binding);
    }
}

}  // namespace lwz

void* lwz_memory_torch_malloc(int64_t size, int device, void*) {
    void* block = nullptr;
    const int status = lwz::guarded([&] {
        const std::lock_guard<std::mutex> lock(lwz::mutex);
        lwz::Binding& binding = lwz::binding_of(device);
        if (size < 1 || size > binding.bytes) return;
        const int64_t bytes = lwz::align(size);
        const int64_t offset = lwz::first_fit(binding, bytes);
        if (offset < 0) return;
        binding.blocks.emplace(offset, bytes);
        if (offset + bytes > binding.end) binding.end = offset + bytes;
        block = reinterpret_cast<void*>(binding.address + offset);
    });
    return status == kLwzMemoryOk ? block : nullptr;
}

void lwz_memory_torch_free(void* address, int64_t, int device, void*) {
    const std::lock_guard<std::mutex> lock(lwz::mutex);
    // Blocks may outlive the binding when a memory is closed by force; they are nobody's then.
    const auto found = lwz::bindings.find(device);
    if (found == lwz::bindings.end()) return;
    lwz::Binding& binding = found->second;
    binding.blocks.erase(
        static_cast<int64_t>(reinterpret_cast<uint64_t>(address) - binding.address));
}

int lwz_memory_bind_allocator(LwzMemory* memory, int64_t region, int device) {
    return lwz::guarded([&] {
        const std::lock_guard<std::mutex> lock(lwz::mutex);
        if (lwz::bindings.count(device) != 0) {
            throw lwz::MemoryFailure(kLwzMemoryInvalid, "device " + std::to_string(device) +
                                                            " already has a bound region");
        }
        lwz::Binding binding;
        binding.memory = memory;
        binding.region = region;
        binding.address = memory->arena.address(region);
        binding.bytes = memory->arena.region_bytes(region);
        lwz::bindings.emplace(device, std::move(binding));
    });
}

int lwz_memory_unbind_allocator(int device) {
    return lwz::guarded([&] {
        const std::lock_guard<std::mutex> lock(lwz::mutex);
        const size_t blocks = lwz::binding_of(device).blocks.size();
        if (blocks != 0) {
            throw lwz::MemoryFailure(kLwzMemoryInvalid, std::to_string(blocks) +
                                                            " blocks of the region are alive");
        }
        lwz::bindings.erase(device);
    });
}

int lwz_memory_allocator_stats(int device, LwzMemoryAllocatorStats* out) {
    return lwz::guarded([&] {
        const std::lock_guard<std::mutex> lock(lwz::mutex);
        const lwz::Binding& binding = lwz::binding_of(device);
        *out = {static_cast<int64_t>(binding.blocks.size()), 0, binding.end};
        for (const auto& [offset, bytes] : binding.blocks) out->used_bytes += bytes;
    });
}
