// Phase memory on a CPU: pages of one memfd, mapped over reserved addresses.
//
// The file is the physical memory: a page is an aligned piece of it, allocated when it is created
// (so that mapping pays for it and not the first touch) and punched out when it is released. Mappings are not inherited by forked children: shared pages would let a child write
// into its parent's tensors.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "phase_memory_backend.h"

namespace lwz {
namespace {

[[noreturn]] void fail(const char* call) {
    const int error = errno;
    const bool is_exhausted = error == ENOMEM || error == ENOSPC;
    throw MemoryFailure(is_exhausted ? kLwzMemoryExhausted : kLwzMemoryDriver,
                        std::string(call) + ": " + std::strerror(error));
}

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

class CpuBackend : public MemoryBackend {
public:
    CpuBackend() : granularity_(sysconf(_SC_PAGESIZE)) {
        file_ = memfd_create("lwz_phase_memory", MFD_CLOEXEC);
        if (file_ < 0) fail("memfd_create");
    }
    ~CpuBackend() override { close(file_); }
    CpuBackend(const CpuBackend&) = delete;
    CpuBackend& operator=(const CpuBackend&) = delete;

    int64_t granularity() const override { return granularity_; }

    int64_t free_bytes() override { return sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE); }

    uint64_t reserve(int64_t bytes) override {
        void* address = mmap(nullptr, bytes, PROT_NONE, kReservation, -1, 0);
        if (address == MAP_FAILED) fail("mmap of addresses");
        return reinterpret_cast<uint64_t>(address);
    }

    void unreserve(uint64_t address, int64_t bytes) override {
        if (munmap(pointer(address), bytes) != 0) fail("munmap");
    }

    uint64_t create(int64_t page_bytes) override {
        const bool is_recycled = !holes_.empty();
        const uint64_t offset = is_recycled ? holes_.back() : end_;
        holes_.reserve((end_ + page_bytes) / page_bytes);  // release() must not need memory
        if (fallocate(file_, 0, offset, page_bytes) != 0) {
            // Part of the page may have been allocated; the error is the one of the allocation.
            const int error = errno;
            fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, page_bytes);
            errno = error;
            fail("fallocate");
        }
        if (is_recycled) {
            holes_.pop_back();
        } else {
            end_ += page_bytes;
        }
        return offset;
    }

    void release(uint64_t handle, int64_t page_bytes) override {
        if (fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, handle, page_bytes) != 0) {
            fail("fallocate of a hole");
        }
        holes_.push_back(handle);
    }

    void map(uint64_t address, uint64_t handle, int64_t page_bytes) override {
        void* mapped = mmap(pointer(address), page_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file_,
                            static_cast<off_t>(handle));
        if (mapped == MAP_FAILED) fail("mmap of a page");
    }

    void allow_access(uint64_t address, int64_t bytes) override {
        if (madvise(pointer(address), bytes, MADV_DONTFORK) != 0) fail("madvise");
        if (mprotect(pointer(address), bytes, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    }

    void unmap(uint64_t address, int64_t page_bytes) override {
        void* reserved =
            mmap(pointer(address), page_bytes, PROT_NONE, kReservation | MAP_FIXED, -1, 0);
        if (reserved == MAP_FAILED) fail("mmap of an empty page");
    }

    void synchronize() override {}  // tensor operations on a CPU have finished when they return

private:
    static constexpr int kReservation = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    const int64_t granularity_;
    int file_ = -1;
    uint64_t end_ = 0;
    std::vector<uint64_t> holes_;
};

}  // namespace

std::unique_ptr<MemoryBackend> open_cpu_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace lwz
