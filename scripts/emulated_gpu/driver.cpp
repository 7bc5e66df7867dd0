// libcuda.so.1 for machines without a GPU: device memory is host memory, and a kernel runs at once, one thread after the
// other, from its source compiled as C++ (`build.py`). It implements what candle and fastflux call, and refuses what a
// GPU would refuse: a kernel that its module does not have, a launch beyond the limits, a copy beyond an allocation. New
// memory holds NaN. At the end it says how much memory was allocated at most.
//
// EMULATED_GPU_GIB is the card's memory, 24 by default. With EMULATED_GPU_COUNT set, what is large is neither computed
// nor copied nor even touched: the numbers are meaningless, and a model of any size tells how much memory it takes.
//
// Not shown by it: anything of time, of streams that run side by side, of threads that race.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <sys/mman.h>

using Result = int;
using Address = uint64_t;
constexpr Result OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NO_IMAGE = 200, NOT_FOUND = 500,
                 NOT_SUPPORTED = 801;

struct Index {
    unsigned x, y, z;
};

// How a kernel is called, and whether its threads wait for each other.
struct Kernel {
    std::string name;
    void (*call)(void *, void **);
    void *function;
    bool waits;
    unsigned shared;  // bytes of dynamic shared memory that a block may have
};

static std::recursive_mutex everything;
using Lock = std::lock_guard<std::recursive_mutex>;

static std::map<std::string, Kernel> &kernels() {
    static auto *all = new std::map<std::string, Kernel>;
    return *all;
}

[[noreturn]] static void fail(const std::string &why) {
    fprintf(stderr, "emulated GPU: %s\n", why.c_str());
    abort();
}

// --- threads of a block: each has a stack, and gives way where it waits ------------------------------------------------

extern "C" {

Index emulated_thread, emulated_block, emulated_block_size, emulated_grid_size;
alignas(1024) char emulated_shared[1 << 18];

void emulated_register(const char *name, void (*call)(void *, void **), void *function, bool waits) {
    kernels()[name] = Kernel{name, call, function, waits, 49152};
}

// Saves the registers and the stack pointer, and goes on on another stack.
void emulated_switch(void **save, void *to);
asm(R"(
.globl emulated_switch
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
}

enum class Waits { not_at_all, for_block, for_warp, done };

struct Copy {
    unsigned to;
    const void *from;
    int bytes;
};

struct Thread {
    char *stack;
    void *at;
    Waits waits;
    Index index;
    std::vector<Copy> copies;  // into shared memory, not yet waited for
};

constexpr int STACK = 1 << 16, WARP = 32, MAX_THREADS = 1024;
static std::vector<Thread> threads;
static void *scheduler;
static int current;
static bool on_a_stack;
static const Kernel *running;
static void **parameters;
static unsigned shared_bytes;
alignas(16) static char exchanged[MAX_THREADS][32];

static void check(const char *what, Address from, size_t bytes);

extern "C" {

int emulated_lane() { return current % WARP; }

// Where a lane of this warp leaves what others read.
void *emulated_slot(int lane) { return exchanged[current / WARP * WARP + lane]; }

static void give_way(Waits waits) {
    if (!on_a_stack) fail(running->name + " waits for other threads, which `build.py` should have seen");
    threads[current].waits = waits;
    emulated_switch(&threads[current].at, scheduler);
}

void emulated_wait_block() { give_way(Waits::for_block); }
void emulated_wait_warp() { give_way(Waits::for_warp); }

// 16 bytes to shared memory, `bytes` of them copied and the rest zeros; nothing of it is seen before it is waited for.
void emulated_copy_later(unsigned to, const void *from, int bytes) {
    if (to % 16 || to + 16 > shared_bytes || (Address)from % 16) fail(running->name + ": a copy beyond its shared memory");
    check("a copy to shared memory from", (Address)from, bytes);
    threads[current].copies.push_back({to, from, bytes});
}

void emulated_finish_copies() {
    for (const Copy &copy : threads[current].copies) {
        memset(emulated_shared + copy.to, 0, 16);
        memcpy(emulated_shared + copy.to, copy.from, copy.bytes);
    }
    threads[current].copies.clear();
}
}

static void start() {
    running->call(running->function, parameters);
    threads[current].waits = Waits::done;
    emulated_switch(&threads[current].at, scheduler);
    abort();
}

// Lets go the threads from `first` to `end` if all that are not done wait for the same.
static bool release(int first, int end, Waits what) {
    bool any = false;
    for (int i = first; i < end; i++) {
        if (threads[i].waits == what) any = true;
        else if (threads[i].waits != Waits::done) return false;
    }
    for (int i = first; i < end; i++)
        if (threads[i].waits == what) threads[i].waits = Waits::not_at_all;
    return any;
}

static void run_together(int count) {
    while ((int)threads.size() < count) threads.push_back({(char *)aligned_alloc(64, STACK), {}, {}, {}, {}});
    for (int i = 0; i < count; i++) {
        const Index size = emulated_block_size;
        void **top = (void **)(threads[i].stack + STACK - 64);
        *--top = nullptr;
        *--top = (void *)start;
        for (int saved = 0; saved < 6; saved++) *--top = nullptr;
        threads[i].at = top;
        threads[i].waits = Waits::not_at_all;
        threads[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        threads[i].copies.clear();
    }
    memset(emulated_shared, 0xff, shared_bytes);
    on_a_stack = true;
    for (bool some = true; some;) {
        for (current = 0; current < count; current++) {
            if (threads[current].waits != Waits::not_at_all) continue;
            emulated_thread = threads[current].index;
            emulated_switch(&scheduler, threads[current].at);
        }
        some = false;
        for (int first = 0; first < count; first += WARP)
            some |= release(first, std::min(first + WARP, count), Waits::for_warp);
        some = some || release(0, count, Waits::for_block);
    }
    on_a_stack = false;
    for (int i = 0; i < count; i++)
        if (threads[i].waits != Waits::done) fail(running->name + ": its threads wait for each other forever");
}

// --- memory --------------------------------------------------------------------------------------------------------------

static std::map<Address, size_t> allocations;
static size_t used, most;
static long launches;

// What is still done where memory is only counted: fastflux compares its kernels with their reference implementations at such sizes.
constexpr size_t SMALL_COPY = 2 << 20;
constexpr double SMALL_LAUNCH = 3e5;

static bool only_counts() {
    static const bool set = getenv("EMULATED_GPU_COUNT");
    return set;
}

static bool done(size_t bytes) { return !only_counts() || bytes <= SMALL_COPY; }

static size_t total() {
    const char *gib = getenv("EMULATED_GPU_GIB");
    return (size_t)((gib ? atof(gib) : 24) * (1ull << 30));
}

static void check(const char *what, Address from, size_t bytes) {
    Lock lock(everything);
    auto after = allocations.upper_bound(from);
    if (bytes == 0) return;
    if (after == allocations.begin() || from + bytes > std::prev(after)->first + std::prev(after)->second)
        fail(std::string(what) + " beyond an allocation");
}

static void report() {
    fprintf(stderr, "emulated GPU: %.1f MB of memory at most, %ld kernels\n", most / 1e6, launches);
}

extern "C" {

Result cuMemAlloc_v2(Address *out, size_t bytes) {
    Lock lock(everything);
    if (bytes == 0) return INVALID_VALUE;
    if (used + bytes > total()) return OUT_OF_MEMORY;
    size_t whole = (bytes + 255) / 256 * 256;
    // of pages that nobody touches the system makes none
    void *memory = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    if (!only_counts()) memset(memory, 0xff, whole);
    *out = (Address)memory;
    allocations[*out] = bytes;
    used += bytes;
    most = std::max(most, used);
    return OK;
}

Result cuMemFree_v2(Address at) {
    Lock lock(everything);
    auto found = allocations.find(at);
    if (found == allocations.end()) fail("freed what was not allocated");
    used -= found->second;
    munmap((void *)at, (found->second + 255) / 256 * 256);
    allocations.erase(found);
    return OK;
}

Result cuMemAllocAsync(Address *out, size_t bytes, void *) { return cuMemAlloc_v2(out, bytes); }
Result cuMemFreeAsync(Address at, void *) { return cuMemFree_v2(at); }

// Pinned memory of the host.
Result cuMemHostAlloc(void **out, size_t bytes, unsigned) { return (*out = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)) ? OK : OUT_OF_MEMORY; }
Result cuMemFreeHost(void *at) { return free(at), OK; }
Result cuMemHostRegister_v2(void *, size_t, unsigned) { return OK; }
Result cuMemHostUnregister(void *) { return OK; }

Result cuMemGetInfo_v2(size_t *free, size_t *all) {
    Lock lock(everything);
    *free = total() - used;
    *all = total();
    return OK;
}

Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *) {
    check("a copy to", to, bytes);
    if (done(bytes)) memcpy((void *)to, from, bytes);
    return OK;
}

Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *) {
    check("a copy from", from, bytes);
    if (done(bytes)) memcpy(to, (void *)from, bytes);
    else memset(to, 0, bytes);
    return OK;
}

Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void *) {
    check("a copy to", to, bytes);
    check("a copy from", from, bytes);
    if (done(bytes)) memmove((void *)to, (void *)from, bytes);
    return OK;
}

Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void *) {
    check("a fill of", to, bytes);
    if (done(bytes)) memset((void *)to, value, bytes);
    return OK;
}

Result cuMemcpyPeerAsync(Address, void *, Address, void *, size_t, void *) { return NOT_SUPPORTED; }

// --- device, context, memory pool ------------------------------------------------------------------------------------

static int something;

Result cuInit(unsigned) {
    static bool once = (atexit(report), true);
    (void)once;
    return OK;
}

Result cuDeviceGet(int *device, int number) {
    *device = 0;
    return number == 0 ? OK : INVALID_DEVICE;
}

// As on an H100, by CUdevice_attribute.
Result cuDeviceGetAttribute(int *value, int attribute, int) {
    static const std::map<int, int> known = {{1, 1024},   {2, 1024},  {3, 1024},     {4, 64},     {5, 2147483647},
                                             {6, 65535},  {7, 65535}, {8, 49152},    {10, 32},    {16, 132},
                                             {39, 2048},  {75, 9},    {76, 0},       {81, 233472}, {97, 232448}};
    auto found = known.find(attribute);
    *value = found == known.end() ? 1 : found->second;
    return OK;
}

Result cuDevicePrimaryCtxRetain(void **context, int) { return *context = &something, OK; }
Result cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Result cuCtxDestroy_v2(void *) { return OK; }
static thread_local void *context;
Result cuCtxGetCurrent(void **out) { return *out = context, OK; }
Result cuCtxSetCurrent(void *given) { return context = given, OK; }
Result cuDeviceGetMemPool(void **pool, int) { return *pool = &something, OK; }
Result cuDeviceGetDefaultMemPool(void **pool, int) { return *pool = &something, OK; }
Result cuMemPoolSetAttribute(void *, int, void *) { return OK; }

Result cuMemPoolGetAttribute(void *, int, void *value) {
    Lock lock(everything);
    *(uint64_t *)value = used;
    return OK;
}

// --- streams and events: all that was asked for has been done ------------------------------------------------------------

Result cuStreamCreate(void **stream, unsigned) { return *stream = &something, OK; }
Result cuStreamDestroy_v2(void *) { return OK; }
Result cuStreamSynchronize(void *) { return OK; }
Result cuCtxSynchronize() { return OK; }
Result cuStreamWaitEvent(void *, void *, unsigned) { return OK; }
Result cuStreamIsCapturing(void *, int *capturing) { return *capturing = 0, OK; }

Result cuEventCreate(void **event, unsigned) { return *event = &something, OK; }
Result cuEventDestroy_v2(void *) { return OK; }
Result cuEventRecord(void *, void *) { return OK; }
Result cuEventSynchronize(void *) { return OK; }
Result cuEventElapsedTime_v2(float *milliseconds, void *, void *) { return *milliseconds = 0, OK; }

Result cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "refused by the emulated GPU";
    return OK;
}

// NVRTC looks for it and takes no for an answer.
Result cuGetExportTable(const void **table, const void *) { return *table = nullptr, NOT_FOUND; }

// --- modules and kernels ---------------------------------------------------------------------------------------------

Result cuModuleLoadData(void **out, const void *image) {
    auto *names = new std::set<std::string>;
    const char *ptx = (const char *)image;
    while ((ptx = strstr(ptx, ".entry "))) {
        ptx += strlen(".entry ");
        names->insert(std::string(ptx, strcspn(ptx, " (\n")));
    }
    *out = names;
    return names->empty() ? NO_IMAGE : OK;
}

Result cuModuleUnload(void *) { return OK; }
Result cuModuleLoad(void **, const char *) { return NOT_SUPPORTED; }

Result cuModuleGetFunction(void **out, void *module, const char *name) {
    auto &names = *(std::set<std::string> *)module;
    if (!names.count(name)) return NOT_FOUND;
    // fastflux has kernels of the same names as candle
    const bool ours = names.count("norm_modulate_f32") || names.count("attention_backward_keys_bf16") || names.count("norm_backward_bf16") ||
                      names.count("add_products_bf16");
    auto found = kernels().find((ours ? "ours:" : "") + std::string(name));
    if (found == kernels().end()) fail(std::string(name) + " is not emulated");
    *out = &found->second;
    return OK;
}

// Only CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
Result cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute != 8 || value < 0 || value > 232448) return INVALID_VALUE;
    ((Kernel *)function)->shared = value;
    return OK;
}

Result cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y,
                      unsigned z, unsigned shared, void *, void **given, void **) {
    Lock lock(everything);
    const bool nothing = !grid_x || !grid_y || !grid_z || !x || !y || !z;
    const bool large = grid_x > 2147483647u || grid_y > 65535 || grid_z > 65535 || z > 64 ||
                       shared > ((Kernel *)function)->shared;
    if (nothing || large || (uint64_t)x * y * z > MAX_THREADS) return INVALID_VALUE;
    launches++;
    if (only_counts() && 1.0 * grid_x * grid_y * grid_z * x * y * z > SMALL_LAUNCH) return OK;
    running = (Kernel *)function;
    parameters = given;
    shared_bytes = shared;
    emulated_grid_size = {grid_x, grid_y, grid_z};
    emulated_block_size = {x, y, z};
    const auto each = [](Index size, auto run) {
        Index at;
        for (at.z = 0; at.z < size.z; at.z++)
            for (at.y = 0; at.y < size.y; at.y++)
                for (at.x = 0; at.x < size.x; at.x++) run(at);
    };
    each(emulated_grid_size, [&](Index block) {
        emulated_block = block;
        if (running->waits) return run_together(x * y * z);
        each(emulated_block_size, [&](Index thread) {
            emulated_thread = thread;
            running->call(running->function, given);
        });
    });
    return OK;
}
}
