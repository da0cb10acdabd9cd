// A card made of software: what a CUDA program asks of libcuda.so.1, on the processor. Memory of the "device" is memory behind guard pages,
// full of NaN when new and gone when freed; kernels are darkroom's and candle's own sources, run by the emulator as they are launched; every
// call does its work before it returns. What a real driver refuses is refused, and so is what streams do to each other's memory out of order
// (order.hpp); page-locked memory cannot be written while the card may still read it. It shows that the right calls are made with the right
// arguments, how much memory they take, and what comes out. It shows nothing of speed.
//
// CARD_MEMORY (bytes), CARD_CAPABILITY (as 9.0) and CARD_NAME make it another card; CARD_LOG names a file for what it has seen, at the end.
// CARD_REFUSE="BYTES COUNT [KERNEL]": it has no memory for the first COUNT allocations of at least BYTES (once KERNEL has run).
// With CARD_DRY=1 it counts memory and calls but computes nothing, and its memory is all zeros, so that the real model's sizes fit here.
#include <cuda.h>

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "emulator.hpp"
#include "fault.hpp"
#include "order.hpp"

extern "C" int emulator_launch(const char *, const uint32_t *, uint32_t, uint32_t, const void *, const uint64_t *, size_t, uint32_t, char *);

struct CUctx_st {}; struct CUstream_st {}; struct CUmemPoolHandle_st {};
struct CUevent_st { std::chrono::steady_clock::time_point at; bool recorded = false; Clock clock; };
struct CUfunc_st { std::string name; bool ours; emulator::Trust trust; const emulator::Kernel *kernel; size_t shared = 48 << 10; };
struct CUmod_st { bool ours; std::string text; std::map<std::string, CUfunc_st> functions; };

namespace {

struct Allocation { char *mapping; size_t mapped, bytes; Uses uses; };

// Page-locked memory of the program's, and what copies may still read from it.
struct Reading { Moment moment; char *begin, *end; };
struct PageLocked { size_t bytes; std::vector<Reading> readings; };

size_t page() { return sysconf(_SC_PAGESIZE); }

const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

struct Card {
    std::mutex lock;
    size_t total = strtoull(setting("CARD_MEMORY", "85899345920"), nullptr, 10);
    size_t used = 0, reserved = 0, most = 0, largest = 0, sent = 0;
    size_t refused_bytes = 0, refusals = 0, refused = 0;
    std::string refused_after;
    std::deque<Allocation> freed; // the last ones, whose addresses nobody gets yet
    uint64_t keeps = 0; // bytes that the pool keeps when nobody uses them
    std::map<CUdeviceptr, Allocation> allocations;
    std::map<char *, PageLocked> page_locked;
    Order order;
    std::set<const void *> streams, events;
    std::map<std::string, size_t> launches;
    size_t seen = 0;                  // as much was in use when this was noted: allocations of each size, and the kernel before
    std::map<size_t, size_t> largest_then;
    std::string last_kernel, kernel_then;
    bool dry = *setting("CARD_DRY", "") != 0;
    uint64_t next = 1ull << 46; // where the next allocation begins that nobody looks into
    bool broken = false;
    uint32_t seed = 1;
    CUctx_st context;
    CUmemPoolHandle_st pool;

    Card() {
        char kernel[100] = "";
        sscanf(setting("CARD_REFUSE", ""), "%zu %zu %99s", &refused_bytes, &refusals, kernel);
        refused_after = kernel;
    }

    ~Card() {
        const char *path = setting("CARD_LOG", "");
        FILE *log = *path ? fopen(path, "w") : nullptr;
        if (!log) return;
        fprintf(log, "{\"most_bytes\": %zu, \"largest_bytes\": %zu, \"left_bytes\": %zu, \"sent_bytes\": %zu, \"refused\": %zu, \"launches\": {",
                most, largest, used, sent, refused);
        const char *comma = "";
        for (auto &[name, count] : launches) fprintf(log, "%s\n  \"%s\": %zu", comma, name.c_str(), count), comma = ",";
        fprintf(log, "},\n\"kernel_before_most\": \"%s\", \"allocations_then\": {", kernel_then.c_str()), comma = "";
        for (auto &[bytes, count] : largest_then) fprintf(log, "%s\n  \"%zu\": %zu", comma, bytes, count), comma = ",";
        fprintf(log, "}}\n");
        fclose(log);
    }
};

Card &card() {
    static Card one;
    return one;
}

thread_local CUcontext current = nullptr;

// How a call begins that needs a context: with the lock held, or the reason why it cannot go on.
struct Call {
    std::unique_lock<std::mutex> held{card().lock};
    CUresult wrong = !current ? CUDA_ERROR_INVALID_CONTEXT : card().broken ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
};
// Also the default one, and the thread's own.
bool open(CUstream stream) { return !stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD || card().streams.count(stream); }

#define IN_CONTEXT \
    Call call; \
    if (call.wrong != CUDA_SUCCESS) return call.wrong;
#define ON_STREAM(stream) \
    IN_CONTEXT \
    if (!open(stream)) return CUDA_ERROR_INVALID_HANDLE;

CUresult broken(const std::string &why) {
    fprintf(stderr, "card: %s\n", why.c_str());
    card().broken = true;
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

// What holds these bytes of the device, or null.
Allocation *holder(CUdeviceptr at, size_t bytes) {
    auto next = card().allocations.upper_bound(at);
    if (next == card().allocations.begin()) return nullptr;
    auto &[begin, allocation] = *std::prev(next);
    return at + bytes <= begin + allocation.bytes ? &allocation : nullptr;
}

// Why a stream's work may not use these bytes of the device now; null if it may.
const char *use(CUdeviceptr at, size_t bytes, Moment now, bool writing) {
    Allocation *allocation = holder(at, bytes);
    if (!allocation) return "goes outside the card's memory";
    return card().order.use(allocation->uses, now, writing) ? nullptr : "may run beside another stream's work with the same memory";
}

// The program has waited: what copies have read by now may be written again.
void let_write() {
    for (auto &[begin, memory] : card().page_locked) {
        size_t before = memory.readings.size();
        std::erase_if(memory.readings, [](const Reading &reading) { return card().order.program_knows(reading.moment); });
        if (memory.readings.size() == before) continue;
        mprotect(begin, memory.bytes, PROT_READ | PROT_WRITE);
        for (Reading &reading : memory.readings) mprotect(reading.begin, reading.end - reading.begin, PROT_READ);
    }
}

// A driver gives memory out in pieces of this size.
constexpr size_t PIECE = 512;
size_t rounded(size_t bytes) { return (bytes + PIECE - 1) / PIECE * PIECE; }

CUresult allocate(CUdeviceptr *at, size_t bytes) {
    Card &c = card();
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    size_t used = c.used + rounded(bytes);
    if (used > c.total) return c.refused++, CUDA_ERROR_OUT_OF_MEMORY;
    if (c.refusals > 0 && bytes >= c.refused_bytes && (c.refused_after.empty() || c.launches.count(c.refused_after)))
        return c.refusals--, c.refused++, CUDA_ERROR_OUT_OF_MEMORY;
    // The allocation ends where the page ends, as far as its alignment allows: what lies behind it is nobody's.
    size_t page = ::page(), length = (bytes + 255) / 256 * 256, mapped = (length + page - 1) / page * page + page;
    // Where nothing is computed, an address is enough.
    char *mapping = c.dry ? (char *)c.next : (char *)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char *begin = mapping + mapped - page - length;
    if (c.dry) c.next += mapped;
    else {
        mprotect(mapping + mapped - page, page, PROT_NONE);
        memset(begin, 0xff, length);
    }
    *at = (CUdeviceptr)begin;
    c.allocations[*at] = {mapping, mapped, bytes, {}};
    c.used = used;
    c.reserved = std::max(c.reserved, used);
    c.most = std::max(c.most, used);
    c.largest = std::max(c.largest, bytes);
    if (used > c.seen + c.seen / 100) {
        c.seen = used, c.kernel_then = c.last_kernel, c.largest_then.clear();
        for (auto &[_, allocation] : c.allocations)
            if (allocation.bytes > used / 200) c.largest_then[allocation.bytes]++;
    }
    return CUDA_SUCCESS;
}

CUresult release(CUdeviceptr at) {
    Card &c = card();
    auto found = c.allocations.find(at);
    if (found == c.allocations.end()) return broken("memory is freed that is not allocated");
    if (!c.dry) {
        // Gone at once; its address is given out again much later, so that late uses are noticed.
        mprotect(found->second.mapping, found->second.mapped, PROT_NONE);
        madvise(found->second.mapping, found->second.mapped, MADV_DONTNEED);
        c.freed.push_back(found->second);
        if (c.freed.size() > 1000) munmap(c.freed.front().mapping, c.freed.front().mapped), c.freed.pop_front();
    }
    c.used -= rounded(found->second.bytes);
    if (c.keeps == 0) c.reserved = c.used;
    c.allocations.erase(found);
    return CUDA_SUCCESS;
}

// Whether a kernel's threads wait for each other, by its text.
emulator::Trust trust(const std::string &text, const std::string &name) {
    size_t begin = text.find(".entry " + name + "("), end = text.find(".entry ", begin + 1);
    if (begin == std::string::npos) return emulator::Trust::Nothing;
    std::string body = text.substr(begin, end == std::string::npos ? end : end - begin);
    for (const char *waits : {"bar.", "barrier.", "shfl.", "vote.", "match."})
        if (body.find(waits) != std::string::npos) return emulator::Trust::Threads;
    return emulator::Trust::All;
}

} // namespace

extern "C" {

// For cuBLAS and the others: why a product on this stream may not use these bytes now; null if it may.
const char *card_use(const void *at, size_t bytes, const void *stream, bool writing) {
    std::lock_guard<std::mutex> held(card().lock);
    return use((CUdeviceptr)at, bytes, card().order.next(stream), writing);
}

CUresult cuInit(unsigned int) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = atoi(setting("CARD_DRIVER", "13000")), CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char **text) {
    switch (error) {
    case CUDA_SUCCESS: *text = "no error"; break;
    case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
    case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; break;
    case CUDA_ERROR_INVALID_CONTEXT: *text = "invalid device context"; break;
    case CUDA_ERROR_INVALID_DEVICE: *text = "invalid device ordinal"; break;
    case CUDA_ERROR_INVALID_HANDLE: *text = "invalid resource handle"; break;
    case CUDA_ERROR_NOT_FOUND: *text = "named symbol not found"; break;
    case CUDA_ERROR_ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; break;
    default: *text = "unknown error"; break;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) { return ordinal == 0 ? (*device = 0, CUDA_SUCCESS) : CUDA_ERROR_INVALID_DEVICE; }

CUresult cuDeviceGetName(char *name, int room, CUdevice) {
    snprintf(name, room, "%s", setting("CARD_NAME", "card of software"));
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    int major = 9, minor = 0;
    sscanf(setting("CARD_CAPABILITY", "9.0"), "%d.%d", &major, &minor);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = minor; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    default:
        fprintf(stderr, "card: nobody has said what attribute %d is\n", attribute);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return *context = &card().context, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxDestroy_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxSynchronize() {
    IN_CONTEXT
    card().order.program_waits_for_all(), let_write();
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *stream, unsigned int) {
    IN_CONTEXT
    card().streams.insert(*stream = new CUstream_st);
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream stream) {
    ON_STREAM(stream)
    card().streams.erase(stream); // not freed: another one at its address would pass for it
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
    ON_STREAM(stream)
    card().order.program_waits(card().order.of(stream)), let_write();
    return CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int) {
    ON_STREAM(stream)
    if (!card().events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    card().order.wait(stream, event->clock);
    return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    ON_STREAM(stream)
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent *event, unsigned int) {
    IN_CONTEXT
    card().events.insert(*event = new CUevent_st);
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent event) {
    IN_CONTEXT
    if (!card().events.erase(event)) return CUDA_ERROR_INVALID_HANDLE;
    delete event;
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    ON_STREAM(stream)
    if (!card().events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    card().order.next(stream);
    event->at = std::chrono::steady_clock::now(), event->recorded = true, event->clock = card().order.of(stream);
    return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
    IN_CONTEXT
    if (!card().events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    card().order.program_waits(event->clock), let_write();
    return CUDA_SUCCESS;
}
CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent begin, CUevent end) {
    IN_CONTEXT
    if (!card().events.count(begin) || !card().events.count(end) || !begin->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(end->at - begin->at).count();
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr *at, size_t bytes) {
    IN_CONTEXT
    return allocate(at, bytes);
}
CUresult cuMemAllocAsync(CUdeviceptr *at, size_t bytes, CUstream stream) {
    ON_STREAM(stream)
    CUresult result = allocate(at, bytes);
    // Before it comes to this, the stream may still work with what was there.
    if (result == CUDA_SUCCESS) use(*at, bytes, card().order.next(stream), true);
    return result;
}
CUresult cuMemFree_v2(CUdeviceptr at) {
    IN_CONTEXT
    card().order.program_waits_for_all(), let_write();
    return release(at);
}
CUresult cuMemFreeAsync(CUdeviceptr at, CUstream stream) {
    ON_STREAM(stream)
    if (const char *why = use(at, 1, card().order.next(stream), true)) return broken(std::string("freeing memory ") + why);
    return release(at);
}
CUresult cuMemHostAlloc(void **at, size_t bytes, unsigned int) {
    IN_CONTEXT
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    size_t mapped = (bytes + page() - 1) / page() * page();
    *at = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    card().page_locked[(char *)*at] = {mapped, {}};
    return CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void *at) {
    IN_CONTEXT
    auto found = card().page_locked.find((char *)at);
    if (found == card().page_locked.end()) return CUDA_ERROR_INVALID_VALUE;
    if (!found->second.readings.empty()) return broken("page-locked memory is freed that a copy may still read");
    munmap(at, found->second.bytes);
    card().page_locked.erase(found);
    return CUDA_SUCCESS;
}
CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    IN_CONTEXT
    *free = card().total - card().reserved, *total = card().total;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice) { return *pool = &card().pool, CUDA_SUCCESS; }
CUresult cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute attribute, void *value) {
    std::lock_guard<std::mutex> held(card().lock);
    switch (attribute) {
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: *(cuuint64_t *)value = card().reserved; return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT: *(cuuint64_t *)value = card().used; return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}
CUresult cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute attribute, void *value) {
    std::lock_guard<std::mutex> held(card().lock);
    if (attribute != CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) return CUDA_ERROR_INVALID_VALUE;
    card().keeps = *(cuuint64_t *)value;
    return CUDA_SUCCESS;
}
CUresult cuMemPoolTrimTo(CUmemoryPool, size_t left) {
    std::lock_guard<std::mutex> held(card().lock);
    card().reserved = std::max(card().used, std::min(card().reserved, left));
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    ON_STREAM(stream)
    Moment now = card().order.next(stream);
    if (const char *why = use(to, bytes, now, true)) return broken(std::string("a copy to the card ") + why);
    card().sent += bytes;
    if (!card().dry) memcpy((void *)to, from, bytes);
    // Other memory is copied before the call returns.
    auto next = card().page_locked.upper_bound((char *)from);
    if (next == card().page_locked.begin()) return CUDA_SUCCESS;
    auto &[begin, memory] = *std::prev(next);
    if ((char *)from >= begin + memory.bytes) return CUDA_SUCCESS;
    size_t first = ((char *)from - begin) / page() * page(), last = ((char *)from - begin + bytes + page() - 1) / page() * page();
    memory.readings.push_back({now, begin + first, begin + last});
    mprotect(begin + first, last - first, PROT_READ);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ON_STREAM(stream)
    if (const char *why = use(from, bytes, card().order.next(stream), false)) return broken(std::string("a copy from the card ") + why);
    if (card().dry) memset(to, 0, bytes);
    else memcpy(to, (const void *)from, bytes);
    // Into memory that is not page-locked, it is done when the call returns.
    card().order.program_waits(card().order.of(stream)), let_write();
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ON_STREAM(stream)
    Moment now = card().order.next(stream);
    const char *reads = use(from, bytes, now, false), *writes = use(to, bytes, now, true);
    if (reads || writes) return broken(std::string("a copy on the card ") + (reads ? reads : writes));
    if (from < to + bytes && to < from + bytes && bytes) return broken("a copy on the card overlaps itself");
    if (!card().dry) memcpy((void *)to, (const void *)from, bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream) { return broken("there is one card"); }
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream stream) {
    ON_STREAM(stream)
    if (const char *why = use(at, bytes, card().order.next(stream), true)) return broken(std::string("setting memory ") + why);
    if (!card().dry) memset((void *)at, value, bytes);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule *, const char *) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    IN_CONTEXT
    uint32_t magic;
    memcpy(&magic, image, sizeof magic);
    bool ours = magic == 0xba55ed50; // of programs compiled for several cards; candle's are text
    *module = new CUmod_st{ours, ours ? "" : (const char *)image, {}};
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return delete module, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    IN_CONTEXT
    auto known = module->functions.find(name);
    if (known != module->functions.end()) return *function = &known->second, CUDA_SUCCESS;
    auto kernel = emulator::find(name);
    auto trusted = module->ours ? emulator::Trust::Nothing : trust(module->text, name);
    if (!module->ours && trusted == emulator::Trust::Nothing) return CUDA_ERROR_NOT_FOUND;
    if (!kernel) {
        fprintf(stderr, "card: the source of %s was not compiled for it\n", name);
        return CUDA_ERROR_NOT_FOUND;
    }
    *function = &(module->functions[name] = {name, module->ours, trusted, kernel});
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    IN_CONTEXT
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || value > 227 << 10) return CUDA_ERROR_INVALID_VALUE;
    function->shared = value;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
                        unsigned int block_y, unsigned int block_z, unsigned int shared, CUstream stream, void **given, void **) {
    ON_STREAM(stream)
    Card &c = card();
    c.launches[function->name]++;
    c.last_kernel = function->name;
    bool grid_fits = grid_x && grid_y && grid_z && grid_x <= 0x7fffffff && grid_y <= 65535 && grid_z <= 65535;
    bool block_fits = block_x && block_y && block_z && block_z <= 64 && (uint64_t)block_x * block_y * block_z <= 1024;
    if (shared > function->shared || !grid_fits || !block_fits) return CUDA_ERROR_INVALID_VALUE;
    if (Fault fault = fault_of(function->name); fault != Fault::none) return fault == Fault::skip ? CUDA_SUCCESS : broken(function->name + " goes astray");
    Moment now = c.order.next(stream);
    for (auto &[at, writing] : function->kernel->pointed(function->ours ? given[0] : (const void *)given))
        if (holder((CUdeviceptr)at, 1))
            if (const char *why = use((CUdeviceptr)at, 1, now, writing)) return broken(function->name + " " + why);
    if (c.dry) return CUDA_SUCCESS;
    if (function->ours) {
        std::vector<uint64_t> buffers;
        for (auto &[begin, allocation] : c.allocations) buffers.insert(buffers.end(), {begin, begin + allocation.bytes, 1});
        uint32_t grid[3] = {grid_x, grid_y, grid_z};
        char message[256];
        if (block_y != 1 || block_z != 1) return CUDA_ERROR_INVALID_VALUE;
        if (emulator_launch(function->name.c_str(), grid, block_x, shared, given[0], buffers.data(), c.allocations.size(), c.seed++, message))
            return broken(function->name + ": " + message);
        return CUDA_SUCCESS;
    }
    std::string wrong = emulator::run({grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, function->kernel->run, given, function->trust, c.seed++);
    return wrong.empty() ? CUDA_SUCCESS : broken(function->name + ": " + wrong);
}

} // extern "C"
