// Compiles only where csrc/phase_memory_driver.h says what cuda.h says.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "phase_memory_driver.h"

using namespace lwz::cuda;

static_assert(kSuccess == CUDA_SUCCESS && kErrorOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(kAttributeVirtualMemory == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
static_assert(kAllocationPinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(kLocationDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(kAccessReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(kGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);

static_assert(sizeof(Location) == sizeof(CUmemLocation));
static_assert(offsetof(Location, id) == offsetof(CUmemLocation, id));
static_assert(sizeof(AllocationProperties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(AllocationProperties, requested_handle_types) ==
              offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(AllocationProperties, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(AllocationProperties, compression_type) ==
              offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(AccessDescription) == sizeof(CUmemAccessDesc));
static_assert(offsetof(AccessDescription, flags) == offsetof(CUmemAccessDesc, flags));

// The same number of parameters, each of the same size, passed in the same way.
template <typename Ours, typename Theirs>
constexpr bool is_same_argument = sizeof(Ours) == sizeof(Theirs) &&
                                  std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;

template <typename Ours, typename Theirs>
struct SameCall : std::false_type {};

template <typename... Ours, typename... Theirs>
struct SameCall<Result (*)(Ours...), CUresult (*)(Theirs...)> {
    static constexpr bool value = [] {
        if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
            return (is_same_argument<Ours, Theirs> && ... && true);
        } else {
            return false;
        }
    }();
};

#define LWZ_COMPARE(symbol, member, parameters) \
    static_assert(SameCall<decltype(Driver::member), decltype(&symbol)>::value, #symbol);
LWZ_CUDA_DRIVER_FUNCTIONS(LWZ_COMPARE)
