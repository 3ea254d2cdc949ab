// What phase memory needs from a device, and how failures travel inside the library.
#ifndef LWZ_PHASE_MEMORY_BACKEND_H
#define LWZ_PHASE_MEMORY_BACKEND_H

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "phase_memory.h"

namespace lwz {

class MemoryFailure : public std::exception {
public:
    MemoryFailure(LwzMemoryStatus status, std::string message)
        : status_(status), message_(std::move(message)) {}
    LwzMemoryStatus status() const { return status_; }
    const char* what() const noexcept override { return message_.c_str(); }

private:
    LwzMemoryStatus status_;
    std::string message_;
};

// Physical memory and address ranges of one device. Sizes are multiples of granularity(), except
// that pages are mapped and unmapped whole. Calls throw MemoryFailure and then have done nothing.
class MemoryBackend {
public:
    virtual ~MemoryBackend() = default;
    virtual int64_t granularity() const = 0;
    virtual int64_t free_bytes() = 0;
    virtual uint64_t reserve(int64_t bytes) = 0;
    virtual void unreserve(uint64_t address, int64_t bytes) = 0;
    // A page is the unit of create, release, map and unmap; a handle names it.
    virtual uint64_t create(int64_t page_bytes) = 0;
    virtual void release(uint64_t handle, int64_t page_bytes) = 0;
    virtual void map(uint64_t address, uint64_t handle, int64_t page_bytes) = 0;
    // Makes a range of mapped pages readable and writable; before this, access faults.
    virtual void allow_access(uint64_t address, int64_t bytes) = 0;
    virtual void unmap(uint64_t address, int64_t page_bytes) = 0;
    // Returns when no work that was started before can touch the device's memory any more.
    virtual void synchronize() = 0;
};

std::unique_ptr<MemoryBackend> open_cpu_backend();
std::unique_ptr<MemoryBackend> open_cuda_backend(const char* driver, int device);

}  // namespace lwz

#endif  // LWZ_PHASE_MEMORY_BACKEND_H
