// A CUDA driver for tests: virtual memory management over memfd and mmap, stricter than the real
// one, with a budget of physical memory, a log of calls, and faults at chosen calls.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "phase_memory_driver.h"

namespace {

using namespace lwz::cuda;

constexpr int kInvalidValue = 1, kInvalidContext = 201, kInvalidDevice = 101, kIllegalAddress = 700;
constexpr std::size_t kGranularity = 64 << 10;

struct Mapping {
    std::size_t size;
    Handle handle;
    bool is_accessible;
    bool is_busy;  // work that was launched may still touch it
};

struct Physical {
    std::size_t size;
    int file;
    int mappings;
    bool is_released;
};

struct State {
    std::size_t budget = 1 << 30;
    std::size_t used = 0;
    bool has_virtual_memory = true;
    long calls = 0;
    long fail_from = -1, fail_until = -1;
    int fail_code = 0;
    bool has_failed = false;
    int retained = 0;
    Context current = nullptr;
    Handle next_handle = 1;
    std::map<Address, std::size_t> reservations;
    std::map<Address, Mapping> mappings;
    std::map<Handle, Physical> physical;
    std::map<std::string, long> counts;
    std::string log;
};

State state;
int context_storage;

// Counts the call, and says whether it is one that shall fail.
Result enter(const char* name) {
    const long call = state.calls++;
    ++state.counts[name];
    state.log += std::string(name) + "\n";
    if (call < state.fail_from || call >= state.fail_until) return kSuccess;
    state.has_failed = true;
    return state.fail_code;
}

#define ENTER()                                      \
    if (const Result fault = enter(__func__)) return fault

void drop(Handle handle) {
    const Physical& page = state.physical.at(handle);
    if (!page.is_released || page.mappings > 0) return;
    close(page.file);
    state.used -= page.size;
    state.physical.erase(handle);
}

bool is_reserved(Address address, std::size_t size) {
    auto next = state.reservations.upper_bound(address);
    if (next == state.reservations.begin()) return false;
    const auto& [begin, bytes] = *--next;
    return address + size <= begin + bytes;
}

bool overlaps_mapping(Address address, std::size_t size) {
    for (const auto& [begin, mapping] : state.mappings) {
        if (begin < address + size && address < begin + mapping.size) return true;
    }
    return false;
}

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

bool is_valid(const AllocationProperties* properties) {
    return properties->type == kAllocationPinned && properties->requested_handle_types == 0 &&
           properties->location.type == kLocationDevice && properties->location.id == 0 &&
           properties->win32_handle_meta_data == nullptr;
}

}  // namespace

#define DRIVER extern "C" __attribute__((visibility("default")))

DRIVER Result cuInit(unsigned int flags) {
    ENTER();
    return flags == 0 ? kSuccess : kInvalidValue;
}

DRIVER Result cuGetErrorName(Result result, const char** name) {
    *name = result == kErrorOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE";
    return kSuccess;
}

DRIVER Result cuDeviceGet(Device* device, int ordinal) {
    ENTER();
    *device = ordinal;
    return ordinal == 0 ? kSuccess : kInvalidDevice;
}

DRIVER Result cuDeviceGetAttribute(int* value, int attribute, Device) {
    ENTER();
    *value = state.has_virtual_memory;
    return attribute == kAttributeVirtualMemory ? kSuccess : kInvalidValue;
}

DRIVER Result cuDevicePrimaryCtxRetain(Context* context, Device) {
    ENTER();
    ++state.retained;
    *context = &context_storage;
    return kSuccess;
}

DRIVER Result cuDevicePrimaryCtxRelease_v2(Device) {
    ENTER();
    --state.retained;
    return kSuccess;
}

DRIVER Result cuCtxPushCurrent_v2(Context context) {
    ENTER();
    if (context != &context_storage) return kInvalidContext;
    state.current = context;
    return kSuccess;
}

DRIVER Result cuCtxPopCurrent_v2(Context* context) {
    ENTER();
    if (state.current == nullptr) return kInvalidContext;
    *context = state.current;
    state.current = nullptr;
    return kSuccess;
}

DRIVER Result cuCtxSynchronize() {
    ENTER();
    if (state.current == nullptr) return kInvalidContext;
    for (auto& [address, mapping] : state.mappings) mapping.is_busy = false;
    return kSuccess;
}

DRIVER Result cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
    ENTER();
    if (state.current == nullptr) return kInvalidContext;
    *free = state.budget - state.used;
    *total = state.budget;
    return kSuccess;
}

DRIVER Result cuMemGetAllocationGranularity(std::size_t* granularity,
                                            const AllocationProperties* properties, int option) {
    ENTER();
    *granularity = kGranularity;
    return is_valid(properties) && option == kGranularityMinimum ? kSuccess : kInvalidValue;
}

DRIVER Result cuMemAddressReserve(Address* address, std::size_t size, std::size_t, Address wanted,
                                  unsigned long long flags) {
    ENTER();
    if (size % kGranularity != 0 || wanted != 0 || flags != 0) return kInvalidValue;
    void* begin = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) return kErrorOutOfMemory;
    *address = reinterpret_cast<Address>(begin);
    state.reservations[*address] = size;
    return kSuccess;
}

DRIVER Result cuMemAddressFree(Address address, std::size_t size) {
    ENTER();
    const auto found = state.reservations.find(address);
    if (found == state.reservations.end() || found->second != size) return kInvalidValue;
    if (overlaps_mapping(address, size)) return kInvalidValue;
    munmap(pointer(address), size);
    state.reservations.erase(found);
    return kSuccess;
}

DRIVER Result cuMemCreate(Handle* handle, std::size_t size, const AllocationProperties* properties,
                          unsigned long long flags) {
    ENTER();
    if (!is_valid(properties) || size % kGranularity != 0 || flags != 0) return kInvalidValue;
    if (state.used + size > state.budget) return kErrorOutOfMemory;
    const int file = memfd_create("fake_cuda_page", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, size) != 0) return kErrorOutOfMemory;
    state.used += size;
    *handle = state.next_handle++;
    state.physical[*handle] = {size, file, 0, false};
    return kSuccess;
}

DRIVER Result cuMemRelease(Handle handle) {
    ENTER();
    const auto found = state.physical.find(handle);
    if (found == state.physical.end() || found->second.is_released) return kInvalidValue;
    found->second.is_released = true;
    drop(handle);
    return kSuccess;
}

DRIVER Result cuMemMap(Address address, std::size_t size, std::size_t offset, Handle handle,
                       unsigned long long flags) {
    ENTER();
    const auto found = state.physical.find(handle);
    if (found == state.physical.end() || found->second.is_released) return kInvalidValue;
    if (offset != 0 || flags != 0 || size != found->second.size) return kInvalidValue;
    if (!is_reserved(address, size) || overlaps_mapping(address, size)) return kInvalidValue;
    mmap(pointer(address), size, PROT_NONE, MAP_SHARED | MAP_FIXED, found->second.file, 0);
    ++found->second.mappings;
    state.mappings[address] = {size, handle, false, false};
    return kSuccess;
}

DRIVER Result cuMemSetAccess(Address address, std::size_t size, const AccessDescription* access,
                             std::size_t count) {
    ENTER();
    if (count != 1 || access->flags != kAccessReadWrite ||
        access->location.type != kLocationDevice || access->location.id != 0) {
        return kInvalidValue;
    }
    // The range has to consist of whole mappings.
    std::set<Address> begins;
    for (Address at = address; at < address + size;) {
        const auto found = state.mappings.find(at);
        if (found == state.mappings.end()) return kInvalidValue;
        begins.insert(at);
        at += found->second.size;
        if (at > address + size) return kInvalidValue;
    }
    mprotect(pointer(address), size, PROT_READ | PROT_WRITE);
    for (const Address begin : begins) state.mappings[begin].is_accessible = true;
    return kSuccess;
}

DRIVER Result cuMemUnmap(Address address, std::size_t size) {
    ENTER();
    const auto found = state.mappings.find(address);
    if (found == state.mappings.end() || found->second.size != size) return kInvalidValue;
    if (found->second.is_busy) return kIllegalAddress;
    mmap(pointer(address), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
         -1, 0);
    const Handle handle = found->second.handle;
    state.mappings.erase(found);
    --state.physical.at(handle).mappings;
    drop(handle);
    return kSuccess;
}

// ---- what the tests ask and set

DRIVER void fake_reset() {
    for (const auto& [address, size] : state.reservations) munmap(pointer(address), size);
    for (const auto& [handle, page] : state.physical) close(page.file);
    state = State();
}

DRIVER void fake_set_budget(std::size_t bytes) { state.budget = bytes; }

DRIVER void fake_set_virtual_memory(int is_supported) {
    state.has_virtual_memory = is_supported != 0;
}

// Starts work that may touch everything that is mapped now; only synchronizing ends it.
DRIVER void fake_launch() {
    for (auto& [address, mapping] : state.mappings) mapping.is_busy = true;
}

// The calls number `first` to `first + count - 1` from now on return `code`.
DRIVER void fake_fail(long first, long count, int code) {
    state.fail_from = state.calls + first;
    state.fail_until = state.fail_from + count;
    state.fail_code = code;
    state.has_failed = false;
}

// Ends that; 1 if a call did fail.
DRIVER int fake_stop_failing() {
    const bool has_failed = state.has_failed;
    fake_fail(0, 0, 0);
    return has_failed;
}

DRIVER void fake_clear_log() { state.log.clear(); }
DRIVER const char* fake_log() { return state.log.c_str(); }
DRIVER long fake_num_calls() { return state.calls; }
DRIVER long fake_count(const char* name) { return state.counts[name]; }
DRIVER long fake_num_reservations() { return state.reservations.size(); }
DRIVER long fake_num_mappings() { return state.mappings.size(); }
DRIVER long fake_num_physical() { return state.physical.size(); }
DRIVER long fake_num_retained() { return state.retained; }
DRIVER int fake_has_current_context() { return state.current != nullptr; }

DRIVER long fake_num_inaccessible() {
    long count = 0;
    for (const auto& [address, mapping] : state.mappings) count += !mapping.is_accessible;
    return count;
}
