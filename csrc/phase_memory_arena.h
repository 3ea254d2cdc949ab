// The page table of a phase memory: who holds which page, and transactions that change it.
#ifndef LWZ_PHASE_MEMORY_ARENA_H
#define LWZ_PHASE_MEMORY_ARENA_H

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "phase_memory_backend.h"

namespace lwz {

class Arena {
public:
    Arena(std::unique_ptr<MemoryBackend> backend, int64_t page_bytes, int64_t capacity_bytes);

    // Goes on after a failure; throws the first one.
    void close(bool keep_addresses);
    int64_t reserve(int64_t num_pages, uint64_t* address);
    void unreserve(int64_t region);
    void apply(const LwzMemoryMove* moves, int64_t num_moves);
    int64_t release_free(int64_t keep);
    void page_table(int64_t region, int64_t* out);
    LwzMemoryStats stats();
    int64_t device_free_bytes();

    uint64_t address(int64_t region);
    int64_t region_bytes(int64_t region);
    // End of the first empty slot that [offset, offset + bytes) touches; 0 where all is mapped.
    int64_t end_of_hole(int64_t region, int64_t offset, int64_t bytes);

private:
    struct Page {
        uint64_t handle = 0;
        bool is_physical = false;
    };
    struct Region {
        uint64_t address = 0;
        bool is_reserved = false;
        std::vector<int64_t> page_of_slot;
    };
    // One page's way; region -1 is the pool, page -1 is one that is created by this transaction.
    struct Step {
        int64_t page;
        uint64_t handle;
        int64_t src_region;
        uint64_t src_address;
        int64_t src_slot;
        int64_t dst_region;
        uint64_t dst_address;
        int64_t dst_slot;
    };
    // How far a transaction got: what has to be undone.
    struct Progress {
        std::vector<uint64_t> created;
        size_t mapped = 0;    // steps whose destination was mapped, or had none
        size_t unmapped = 0;  // steps whose source was unmapped, or had none
    };

    std::unique_lock<std::mutex> lock_readable();
    std::unique_lock<std::mutex> lock_usable();
    Region& region_at(int64_t region);
    std::vector<Step> plan(const LwzMemoryMove* moves, int64_t num_moves);
    void execute(std::vector<Step>& steps, Progress& progress);
    void undo(const std::vector<Step>& steps, Progress& progress, const std::string& cause);
    void commit(const std::vector<Step>& steps, const Progress& progress);
    void allow_access(const std::vector<Step>& steps, uint64_t Step::*address,
                      int64_t Step::*region, size_t end);
    int64_t adopt(uint64_t handle);
    bool is_foreign_process() const;

    std::mutex mutex_;
    std::unique_ptr<MemoryBackend> backend_;
    const pid_t pid_;
    bool is_broken_ = false;
    std::vector<Region> regions_;
    std::vector<Page> pages_;
    std::vector<int64_t> free_;    // physical pages in no region, last in first out
    std::vector<int64_t> absent_;  // ids that have no physical page
    LwzMemoryStats stats_{};
};

}  // namespace lwz

struct LwzMemory {
    lwz::Arena arena;
};

namespace lwz {

// Forgets the torch allocators that serve from this memory.
void unbind_allocators(const LwzMemory* memory);

void set_error(const char* message);

// Runs `call` and turns what it throws into a status and this thread's message.
template <typename Call>
int guarded(const Call& call) {
    try {
        call();
        return kLwzMemoryOk;
    } catch (const MemoryFailure& failure) {
        set_error(failure.what());
        return failure.status();
    } catch (const std::bad_alloc&) {
        set_error("the host has no memory left for the page table");
        return kLwzMemoryExhausted;
    } catch (const std::length_error&) {
        set_error("the number of pages is too large for a page table");
        return kLwzMemoryInvalid;
    }
}

}  // namespace lwz

#endif  // LWZ_PHASE_MEMORY_ARENA_H
