// Phase memory on an NVIDIA GPU: the driver's virtual memory management, found at run time.
//
// A page is one cuMemCreate allocation, because the driver maps and unmaps allocations whole. The
// device's primary context (the one PyTorch uses) is retained, and current only during a call.
#include <dlfcn.h>

#include "phase_memory_backend.h"
#include "phase_memory_driver.h"

namespace lwz {
namespace {

using namespace cuda;

// dlopen that closes.
class Library {
public:
    explicit Library(const char* file) : handle_(dlopen(file, RTLD_NOW | RTLD_LOCAL)) {
        if (handle_ == nullptr) throw MemoryFailure(kLwzMemoryUnavailable, dlerror());
    }
    ~Library() { dlclose(handle_); }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    template <typename Function>
    void find(const char* symbol, Function*& function) const {
        function = reinterpret_cast<Function*>(dlsym(handle_, symbol));
        if (function == nullptr) {
            throw MemoryFailure(kLwzMemoryUnavailable,
                                std::string("the driver library has no ") + symbol +
                                    ": install a driver for CUDA 11.2 or newer");
        }
    }

private:
    void* handle_;
};

class CudaBackend : public MemoryBackend {
public:
    CudaBackend(const char* driver, int ordinal) : library_(driver) {
#define LWZ_FIND(symbol, member, parameters) library_.find(#symbol, driver_.member);
        LWZ_CUDA_DRIVER_FUNCTIONS(LWZ_FIND)
#undef LWZ_FIND
        check_open(driver_.init(0), "cuInit");
        check_open(driver_.device_get(&device_, ordinal), "cuDeviceGet");
        int is_supported = 0;
        check_open(driver_.device_get_attribute(&is_supported, kAttributeVirtualMemory, device_),
                   "cuDeviceGetAttribute");
        if (is_supported == 0) {
            throw MemoryFailure(kLwzMemoryUnavailable,
                                "the device has no virtual memory management");
        }
        properties_.type = kAllocationPinned;
        properties_.location = {kLocationDevice, device_};
        std::size_t granularity = 0;
        check_open(driver_.mem_get_granularity(&granularity, &properties_, kGranularityMinimum),
                   "cuMemGetAllocationGranularity");
        granularity_ = static_cast<int64_t>(granularity);
        check_open(driver_.primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
    }

    ~CudaBackend() override { driver_.primary_context_release(device_); }

    int64_t granularity() const override { return granularity_; }

    int64_t free_bytes() override {
        std::size_t free = 0, total = 0;
        in_context([&] { check(driver_.mem_get_info(&free, &total), "cuMemGetInfo"); });
        return static_cast<int64_t>(free);
    }

    uint64_t reserve(int64_t bytes) override {
        Address address = 0;
        check(driver_.mem_address_reserve(&address, bytes, 0, 0, 0), "cuMemAddressReserve");
        return address;
    }

    void unreserve(uint64_t address, int64_t bytes) override {
        check(driver_.mem_address_free(address, bytes), "cuMemAddressFree");
    }

    uint64_t create(int64_t page_bytes) override {
        Handle handle = 0;
        check(driver_.mem_create(&handle, page_bytes, &properties_, 0), "cuMemCreate");
        return handle;
    }

    void release(uint64_t handle, int64_t) override {
        check(driver_.mem_release(handle), "cuMemRelease");
    }

    void map(uint64_t address, uint64_t handle, int64_t page_bytes) override {
        check(driver_.mem_map(address, page_bytes, 0, handle, 0), "cuMemMap");
    }

    void allow_access(uint64_t address, int64_t bytes) override {
        const AccessDescription access{properties_.location, kAccessReadWrite};
        check(driver_.mem_set_access(address, bytes, &access, 1), "cuMemSetAccess");
    }

    void unmap(uint64_t address, int64_t page_bytes) override {
        check(driver_.mem_unmap(address, page_bytes), "cuMemUnmap");
    }

    void synchronize() override {
        in_context([&] { check(driver_.context_synchronize(), "cuCtxSynchronize"); });
    }

private:
    std::string describe(Result result, const char* call) const {
        const char* name = nullptr;
        if (driver_.get_error_name(result, &name) != kSuccess || name == nullptr) name = "error";
        return std::string(call) + ": " + name + " (" + std::to_string(result) + ")";
    }

    void check(Result result, const char* call) const {
        if (result == kSuccess) return;
        throw MemoryFailure(
            result == kErrorOutOfMemory ? kLwzMemoryExhausted : kLwzMemoryDriver,
            describe(result, call));
    }

    void check_open(Result result, const char* call) const {
        if (result != kSuccess) {
            throw MemoryFailure(kLwzMemoryUnavailable, describe(result, call));
        }
    }

    template <typename Call>
    void in_context(const Call& call) {
        Context popped = nullptr;
        check(driver_.context_push(context_), "cuCtxPushCurrent");
        try {
            call();
        } catch (...) {
            driver_.context_pop(&popped);
            throw;
        }
        check(driver_.context_pop(&popped), "cuCtxPopCurrent");
    }

    Library library_;
    Driver driver_;
    Device device_ = 0;
    Context context_ = nullptr;
    AllocationProperties properties_{};
    int64_t granularity_ = 0;
};

}  // namespace

std::unique_ptr<MemoryBackend> open_cuda_backend(const char* driver, int device) {
    return std::make_unique<CudaBackend>(driver, device);
}

}  // namespace lwz
