// TEST-ONLY SIMULATOR. The part of Ascend's runtime (libascendcl) that decides where memory lives and when work is
// done: devices, memory, streams, events. "Device memory" is host memory, and every call finishes before it returns,
// so a stream is a token that never has anything pending and an event is the moment at which it was recorded.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <unordered_map>

#include "acl/acl.h"
#include "trace.h"

namespace {

constexpr size_t kAlignment = 512;  // what the real allocator guarantees
constexpr size_t kDeviceMemory = 64ull << 30;
constexpr aclError kOutOfMemory = 207001;

thread_local int32_t current_device = 0;
thread_local aclrtContext current_context = reinterpret_cast<aclrtContext>(1);

std::mutex allocations_mutex;
std::unordered_map<void *, size_t> allocations;
std::unordered_map<void *, size_t> reservations;
std::atomic<size_t> allocated_bytes{0};

struct Event {
    timespec recorded;
};

void *aligned(size_t bytes) {
    size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
}

uint32_t device_count() {
    const char *count = getenv("NPU_SIM_DEVICES");
    return count == nullptr ? 8 : static_cast<uint32_t>(atoi(count));
}

aclError copied(void *to, const void *from, size_t bytes, aclrtMemcpyKind kind) {
    if (kind == ACL_MEMCPY_DEVICE_TO_HOST) {
        npu_sim_note("copy to the host");
    }
    memmove(to, from, bytes);
    return ACL_SUCCESS;
}

aclError new_stream(aclrtStream *stream) {
    *stream = malloc(1);
    return ACL_SUCCESS;
}

aclError new_event(aclrtEvent *event) {
    auto *created = new Event;
    clock_gettime(CLOCK_MONOTONIC, &created->recorded);
    *event = created;
    return ACL_SUCCESS;
}

const timespec &moment(aclrtEvent event) {
    return static_cast<Event *>(event)->recorded;
}

}  // namespace

extern "C" {

// ---- devices and contexts

aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = device_count();
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || static_cast<uint32_t>(device) >= device_count()) {
        return ACL_ERROR_INVALID_PARAM;
    }
    current_device = device;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device) {
    *device = current_device;
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext *context) {
    *context = current_context;
    return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    current_context = context;
    return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t, uint32_t *flags, int32_t *active) {
    if (flags != nullptr) {
        *flags = 0;
    }
    *active = 1;
    return ACL_SUCCESS;
}

const char *aclrtGetSocName() {
    return "Ascend910B1";  // an Atlas A2: torch_npu chooses its bf16 and fused paths by this name
}

// ---- memory

aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = kDeviceMemory;
    *free_bytes = kDeviceMemory - allocated_bytes;
    return ACL_SUCCESS;
}

aclError aclrtMalloc(void **pointer, size_t bytes, aclrtMemMallocPolicy) {
    *pointer = aligned(bytes);
    if (*pointer == nullptr) {
        return kOutOfMemory;
    }
    allocated_bytes += bytes;
    std::lock_guard<std::mutex> lock(allocations_mutex);
    allocations[*pointer] = bytes;
    return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void **pointer, size_t bytes, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(pointer, bytes, policy);
}

aclError aclrtFree(void *pointer) {
    {
        std::lock_guard<std::mutex> lock(allocations_mutex);
        allocated_bytes -= allocations[pointer];
        allocations.erase(pointer);
    }
    free(pointer);
    return ACL_SUCCESS;
}

aclError aclrtMallocHost(void **pointer, size_t bytes) {
    *pointer = aligned(bytes);
    return *pointer == nullptr ? kOutOfMemory : ACL_SUCCESS;
}

aclError aclrtMallocHostWithCfg(void **pointer, uint64_t bytes, aclrtMallocConfig *) {
    return aclrtMallocHost(pointer, bytes);
}

aclError aclrtFreeHost(void *pointer) {
    free(pointer);
    return ACL_SUCCESS;
}

aclError aclrtMemcpy(void *to, size_t, const void *from, size_t bytes, aclrtMemcpyKind kind) {
    return copied(to, from, bytes, kind);
}

aclError aclrtMemcpyAsync(void *to, size_t, const void *from, size_t bytes, aclrtMemcpyKind kind, aclrtStream) {
    return copied(to, from, bytes, kind);
}

aclError aclrtMemcpyAsyncWithCondition(void *to, size_t, const void *from, size_t bytes, aclrtMemcpyKind kind,
                                       aclrtStream) {
    return copied(to, from, bytes, kind);
}

aclError aclrtMemset(void *to, size_t, int32_t value, size_t bytes) {
    memset(to, value, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *to, size_t, int32_t value, size_t bytes, aclrtStream) {
    memset(to, value, bytes);
    return ACL_SUCCESS;
}

// Virtual memory (PYTORCH_NPU_ALLOC_CONF=expandable_segments:True): reserving already provides the pages.
// torch_npu reserves more than the device has; the host gives a page when it is first written to.
aclError aclrtReserveMemAddress(void **pointer, size_t bytes, size_t, void *, uint64_t) {
    *pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*pointer == MAP_FAILED) {
        return kOutOfMemory;
    }
    std::lock_guard<std::mutex> lock(allocations_mutex);
    reservations[*pointer] = bytes;
    return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void *pointer) {
    std::lock_guard<std::mutex> lock(allocations_mutex);
    munmap(pointer, reservations[pointer]);
    reservations.erase(pointer);
    return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t, const aclrtPhysicalMemProp *, uint64_t) {
    *handle = static_cast<aclrtDrvMemHandle>(malloc(1));
    return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    free(handle);
    return ACL_SUCCESS;
}

// ---- streams

aclError aclrtCreateStream(aclrtStream *stream) {
    return new_stream(stream);
}

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t) {
    return new_stream(stream);
}

aclError aclrtDestroyStream(aclrtStream stream) {
    free(stream);
    return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream stream) {
    free(stream);
    return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus *status) {
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream, int32_t *id) {
    *id = 1;
    return ACL_SUCCESS;
}

aclError aclrtLaunchCallback(aclrtCallback function, void *data, aclrtCallbackBlockType, aclrtStream) {
    function(data);
    return ACL_SUCCESS;
}

aclError aclrtLaunchHostFunc(aclrtStream, aclrtHostFunc function, void *data) {
    function(data);
    return ACL_SUCCESS;
}

// ---- events

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t) {
    return new_event(event);
}

aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t) {
    return new_event(event);
}

aclError aclrtDestroyEvent(aclrtEvent event) {
    delete static_cast<Event *>(event);
    return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream) {
    clock_gettime(CLOCK_MONOTONIC, &static_cast<Event *>(event)->recorded);
    return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus *status) {
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus *status) {
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
    double seconds = static_cast<double>(moment(end).tv_sec - moment(start).tv_sec);
    double nanoseconds = static_cast<double>(moment(end).tv_nsec - moment(start).tv_nsec);
    *milliseconds = static_cast<float>(seconds * 1e3 + nanoseconds / 1e6);
    return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t *microseconds) {
    *microseconds = moment(event).tv_sec * 1000000ull + moment(event).tv_nsec / 1000;
    return ACL_SUCCESS;
}

}  // extern "C"
