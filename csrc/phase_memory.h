// The C interface of phase memory: physical pages that take turns behind fixed virtual addresses.
//
// A memory holds at most `capacity` bytes of physical pages, all of one size. A region is a range
// of reserved addresses that never changes; each of its page-sized slots holds one page or none.
// A page is in one slot, or in the pool of free pages, or was given back to the device. Moving a
// page keeps its bytes; a page that comes from the pool has undefined content. Addresses without a
// page fault. Every call takes the memory's lock; calls fail in a forked child.
#ifndef LWZ_PHASE_MEMORY_H
#define LWZ_PHASE_MEMORY_H

#include <cstdint>

#define LWZ_MEMORY_EXPORT extern "C" __attribute__((visibility("default")))

// Raised with every change below; library.py refuses a library of another version.
constexpr int kLwzMemoryAbiVersion = 1;

enum LwzMemoryStatus : int {
    kLwzMemoryOk = 0,
    kLwzMemoryInvalid = 1,      // the caller's fault; nothing was done
    kLwzMemoryExhausted = 2,    // over capacity, or the device or host has no memory left
    kLwzMemoryDriver = 3,       // a driver call failed; the state is what it was before
    kLwzMemoryBroken = 4,       // undoing failed too: page tables, statistics and closing are left
    kLwzMemoryUnavailable = 5,  // no driver, no device, or one without virtual memory management
};

struct LwzMemory;

// Moves `num_pages` consecutive pages. Region -1 is the pool (its page index is ignored): as a
// source it provides free pages and, after them, new ones; as a destination it takes pages back.
struct LwzMemoryMove {
    int64_t src_region;
    int64_t src_page;
    int64_t dst_region;
    int64_t dst_page;
    int64_t num_pages;
};

// Pages unless the name says otherwise. Numbers of operations count pages too, but for
// `synchronizations` and `rollbacks`, which count calls.
struct LwzMemoryStats {
    int64_t page_bytes;
    int64_t capacity;
    int64_t physical;
    int64_t mapped;
    int64_t free;
    int64_t peak_physical;
    int64_t peak_mapped;
    int64_t created;
    int64_t released;
    int64_t maps;
    int64_t unmaps;
    int64_t handovers;
    int64_t synchronizations;
    int64_t rollbacks;
};

LWZ_MEMORY_EXPORT int lwz_memory_abi_version();

// What went wrong in this thread's last call that returned another status than kLwzMemoryOk.
LWZ_MEMORY_EXPORT const char* lwz_memory_error();

// `page_bytes` is a multiple of the device's granularity; 0 takes the smallest one that makes at
// most kLwzMemoryDefaultMaxPages pages of the capacity, which is rounded down to whole pages.
constexpr int64_t kLwzMemoryDefaultMaxPages = 2048;
LWZ_MEMORY_EXPORT int lwz_memory_open_cpu(int64_t page_bytes, int64_t capacity_bytes,
                                          LwzMemory** memory);
// `driver` is the file name of the CUDA driver library, loaded here with dlopen.
LWZ_MEMORY_EXPORT int lwz_memory_open_cuda(const char* driver, int device, int64_t page_bytes,
                                           int64_t capacity_bytes, LwzMemory** memory);

// Waits for the device, unmaps and releases every page, gives the addresses back unless they are to
// be kept reserved (for views that are still alive), and frees the object, whatever the status.
LWZ_MEMORY_EXPORT int lwz_memory_close(LwzMemory* memory, int keep_addresses);

// Reserves addresses for `num_pages` pages, none of them mapped.
LWZ_MEMORY_EXPORT int lwz_memory_reserve(LwzMemory* memory, int64_t num_pages, int64_t* region,
                                         uint64_t* address);
// Gives back the addresses of a region that has no pages.
LWZ_MEMORY_EXPORT int lwz_memory_unreserve(LwzMemory* memory, int64_t region);

// All moves or none. Source slots must hold pages and destination slots must be empty before the
// call, and no slot or page may be named twice. Where pages leave a region the device is
// synchronized once, before anything else. New mappings are made before old ones are dropped, so
// that a failed one leaves the old ones as they were.
LWZ_MEMORY_EXPORT int lwz_memory_apply(LwzMemory* memory, const LwzMemoryMove* moves,
                                       int64_t num_moves);

// Gives free pages back to the device until `keep` are left. Not undone if the driver fails.
LWZ_MEMORY_EXPORT int lwz_memory_release_free(LwzMemory* memory, int64_t keep, int64_t* released);

// out [num_pages of the region]: the id of the page in each slot, -1 where there is none.
LWZ_MEMORY_EXPORT int lwz_memory_page_table(LwzMemory* memory, int64_t region, int64_t* out);

LWZ_MEMORY_EXPORT int lwz_memory_stats(LwzMemory* memory, LwzMemoryStats* out);

// What the driver (on a CPU: the system) could still give to anyone.
LWZ_MEMORY_EXPORT int lwz_memory_device_free_bytes(LwzMemory* memory, int64_t* out);

// The functions that torch.cuda.memory.CUDAPluggableAllocator takes. They serve from the region
// that is bound to the device, at multiples of 512 bytes, first fit; they return null (torch: out
// of memory) where no region is bound, no gap of mapped pages is large enough, or it has no pages
// now. Blocks may be freed while their pages are elsewhere: only addresses are accounted for.
LWZ_MEMORY_EXPORT void* lwz_memory_torch_malloc(int64_t size, int device, void* stream);
LWZ_MEMORY_EXPORT void lwz_memory_torch_free(void* address, int64_t size, int device,
                                             void* stream);

struct LwzMemoryAllocatorStats {
    int64_t blocks;      // alive
    int64_t used_bytes;  // in them
    int64_t end_bytes;   // behind the last byte that was ever handed out, from the region's start
};

LWZ_MEMORY_EXPORT int lwz_memory_bind_allocator(LwzMemory* memory, int64_t region, int device);
// Refused while blocks are alive.
LWZ_MEMORY_EXPORT int lwz_memory_unbind_allocator(int device);
LWZ_MEMORY_EXPORT int lwz_memory_allocator_stats(int device, LwzMemoryAllocatorStats* out);

#endif  // LWZ_PHASE_MEMORY_H
