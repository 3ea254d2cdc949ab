// The part of the CUDA driver interface that phase memory calls, declared here so that the library
// builds without the CUDA toolkit. Layouts and values are those of cuda.h (a test compares them).
#ifndef LWZ_PHASE_MEMORY_DRIVER_H
#define LWZ_PHASE_MEMORY_DRIVER_H

#include <cstddef>

namespace lwz::cuda {

using Result = int;
using Device = int;
using Context = void*;
using Address = unsigned long long;
using Handle = unsigned long long;

constexpr Result kSuccess = 0;
constexpr Result kErrorOutOfMemory = 2;
constexpr int kAttributeVirtualMemory = 102;
constexpr int kAllocationPinned = 1;
constexpr int kLocationDevice = 1;
constexpr int kAccessReadWrite = 3;
constexpr int kGranularityMinimum = 0;

struct Location {
    int type;
    int id;
};

struct AllocationProperties {
    int type;
    int requested_handle_types;
    Location location;
    void* win32_handle_meta_data;
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
};

struct AccessDescription {
    Location location;
    int flags;
};

// X(name of the symbol in the library, member, parameters)
#define LWZ_CUDA_DRIVER_FUNCTIONS(X)                                                            \
    X(cuInit, init, (unsigned int flags))                                                       \
    X(cuGetErrorName, get_error_name, (Result result, const char** name))                       \
    X(cuDeviceGet, device_get, (Device * device, int ordinal))                                  \
    X(cuDeviceGetAttribute, device_get_attribute, (int* value, int attribute, Device device))   \
    X(cuDevicePrimaryCtxRetain, primary_context_retain, (Context * context, Device device))     \
    X(cuDevicePrimaryCtxRelease_v2, primary_context_release, (Device device))                   \
    X(cuCtxPushCurrent_v2, context_push, (Context context))                                     \
    X(cuCtxPopCurrent_v2, context_pop, (Context * context))                                     \
    X(cuCtxSynchronize, context_synchronize, ())                                                \
    X(cuMemGetInfo_v2, mem_get_info, (std::size_t * free, std::size_t * total))                 \
    X(cuMemGetAllocationGranularity, mem_get_granularity,                                       \
      (std::size_t * granularity, const AllocationProperties* properties, int option))          \
    X(cuMemAddressReserve, mem_address_reserve,                                                 \
      (Address * address, std::size_t size, std::size_t alignment, Address wanted,              \
       unsigned long long flags))                                                               \
    X(cuMemAddressFree, mem_address_free, (Address address, std::size_t size))                  \
    X(cuMemCreate, mem_create,                                                                  \
      (Handle * handle, std::size_t size, const AllocationProperties* properties,               \
       unsigned long long flags))                                                               \
    X(cuMemRelease, mem_release, (Handle handle))                                               \
    X(cuMemMap, mem_map,                                                                        \
      (Address address, std::size_t size, std::size_t offset, Handle handle,                    \
       unsigned long long flags))                                                               \
    X(cuMemUnmap, mem_unmap, (Address address, std::size_t size))                               \
    X(cuMemSetAccess, mem_set_access,                                                           \
      (Address address, std::size_t size, const AccessDescription* access, std::size_t count))

struct Driver {
#define LWZ_DECLARE(symbol, member, parameters) Result(*member) parameters = nullptr;
    LWZ_CUDA_DRIVER_FUNCTIONS(LWZ_DECLARE)
#undef LWZ_DECLARE
};

}  // namespace lwz::cuda

#endif  // LWZ_PHASE_MEMORY_DRIVER_H
