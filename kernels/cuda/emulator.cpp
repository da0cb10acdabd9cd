// The emulator and, compiled with it, every kernel. One function is called from Rust: emulator_launch.
#include <setjmp.h>

#include "faulty.cu"
#include "kernels.cu"

thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

enum class State { Ready, AtBlockBarrier, AtWarp, Done };

constexpr size_t STACK = 128 << 10;

struct Copy { void *to; const void *from; bool valid; };

struct Fiber {
    ucontext_t context; // to begin with
    jmp_buf jump;       // to go on with, which costs no call of the system
    bool begun = false;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state = State::Ready;
    const char *what = ""; // the warp does together
    void *given = nullptr;
    std::function<void(void *const *)> then;
    std::vector<std::vector<Copy>> groups; // committed copies, oldest first
    std::vector<Copy> started;
};

// Bytes behind shared memory that must stay as they are.
constexpr size_t GUARD = 32 << 10;

struct Range { const char *begin, *end; bool writable; };

// State of the launch that this thread of the processor is running.
thread_local std::vector<Fiber> *fibers;
thread_local uint32_t current;
thread_local jmp_buf scheduler;
thread_local Trust trust;
thread_local std::vector<unsigned char> *shared_memory;
thread_local std::vector<Range> *ranges; // the last one used comes first
thread_local void (*body)(const void *);
thread_local const void *arguments;
thread_local std::string *failure;

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

Fiber &self() { return (*fibers)[current]; }

__attribute__((noinline)) void wait_as(State state) {
    if (fibers->empty()) fault("a thread waits where none was said to");
    self().state = state;
    if (_setjmp(self().jump) == 0) _longjmp(scheduler, 1);
}

// A fiber's whole life: a thread of one block after another.
void live() {
    for (;;) {
        try {
            body(arguments);
        } catch (const Fault &fault) {
            if (failure->empty()) *failure = fault.what();
        }
        wait_as(State::Done);
    }
}

__attribute__((noinline)) void go_on(Fiber &fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.jump, 1);
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, live, 0);
    setcontext(&fiber.context);
}

Dim3 thread_of(uint32_t i) {
    return {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
}

// Runs each of these threads until it waits for others. Whether any could run.
bool run(const std::vector<uint32_t> &threads) {
    bool ran = false;
    for (uint32_t i : threads) {
        if ((*fibers)[i].state != State::Ready || !failure->empty()) continue;
        ran = true;
        current = i;
        threadIdx = thread_of(i);
        go_on((*fibers)[i]);
    }
    return ran;
}

// Lets the lanes of a warp go on that all have come to the same place. Whether they had.
bool meet(uint32_t warp) {
    auto begin = fibers->begin() + 32 * warp, end = std::min(begin + 32, fibers->end());
    auto gone = [](const Fiber &fiber) { return trust != Trust::Nothing && fiber.state == State::Done; };
    auto first = std::find_if_not(begin, end, gone);
    if (first == end) return false;
    if (!std::all_of(begin, end, [&](const Fiber &fiber) { return fiber.state == State::AtWarp || gone(fiber); })) return false;
    if (!std::all_of(begin, end, [&](const Fiber &fiber) { return gone(fiber) || !strcmp(fiber.what, first->what); })) {
        *failure = std::string("lanes of a warp meet in ") + first->what + " and elsewhere";
        return false;
    }
    void *given[32] = {};
    for (auto fiber = begin; fiber != end; fiber++)
        if (!gone(*fiber)) given[fiber - begin] = fiber->given;
    first->then(given);
    for (auto fiber = begin; fiber != end; fiber++)
        if (!gone(*fiber)) fiber->state = State::Ready;
    return true;
}

void run_block(uint32_t threads, std::mt19937 &random) {
    std::vector<uint32_t> order(threads);
    for (uint32_t i = 0; i < threads; i++) {
        Fiber &fiber = (*fibers)[order[i] = i];
        fiber.state = State::Ready;
        fiber.groups.clear();
        fiber.started.clear();
    }
    // A NaN in every float, so that reading what nobody wrote shows.
    std::fill(shared_memory->begin(), shared_memory->end(), 0xff);
    // Half of all launches run one warp at a time as far as it can go, so that warps run ahead of each other by all that barriers allow;
    // the others run all threads from one meeting to the next.
    bool ahead = random() % 2 == 0;
    std::vector<uint32_t> warps((threads + 31) / 32);
    for (uint32_t i = 0; i < warps.size(); i++) warps[i] = i;
    while (failure->empty()) {
        bool ran = false;
        std::shuffle(warps.begin(), warps.end(), random);
        std::shuffle(order.begin(), order.end(), random);
        if (!ahead) ran = run(order);
        for (uint32_t warp : warps) {
            std::vector<uint32_t> lanes(std::min(32u, threads - 32 * warp));
            for (uint32_t i = 0; i < lanes.size(); i++) lanes[i] = 32 * warp + i;
            std::shuffle(lanes.begin(), lanes.end(), random);
            do ran = (ahead && run(lanes)) || ran;
            while (failure->empty() && meet(warp) && ((ran = true)) && ahead);
        }
        if (!failure->empty()) return;
        auto in = [&](State state) {
            return (size_t)std::count_if(fibers->begin(), fibers->end(), [=](const Fiber &fiber) { return fiber.state == state; });
        };
        if (in(State::Done) == threads) return;
        size_t ended = trust == Trust::Nothing ? 0 : in(State::Done);
        if (in(State::AtBlockBarrier) + ended == threads) {
            for (Fiber &fiber : *fibers)
                if (fiber.state == State::AtBlockBarrier) fiber.state = State::Ready;
            ran = true;
        }
        if (!ran) *failure = "not all threads reach a barrier";
    }
}

} // namespace

void list(const char *name, Kernel kernel) { kernels()[name] = kernel; }

const Kernel *find(const char *name) {
    auto kernel = kernels().find(name);
    return kernel == kernels().end() ? nullptr : &kernel->second;
}

std::string run(Dim3 grid, Dim3 block, size_t shared_bytes, void (*kernel)(const void *), const void *given, Trust given_trust, uint32_t seed) {
    std::string failed;
    uint32_t threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        return "a card refuses this grid";
    std::vector<Fiber> all(given_trust == Trust::All ? 0 : threads);
    std::vector<unsigned char> memory(shared_bytes + 16 + GUARD);
    std::mt19937 random(seed);
    fibers = &all, shared_memory = &memory, trust = given_trust;
    body = kernel, arguments = given, failure = &failed;
    blockDim = block, gridDim = grid;
    for (uint32_t z = 0; z < grid.z; z++)
        for (uint32_t y = 0; y < grid.y; y++)
            for (uint32_t x = 0; x < grid.x && failed.empty(); x++) {
                blockIdx = {x, y, z};
                if (trust == Trust::All) {
                    try {
                        for (uint32_t i = 0; i < threads; i++) {
                            threadIdx = thread_of(i);
                            body(arguments);
                        }
                    } catch (const Fault &fault) {
                        failed = fault.what();
                    }
                    continue;
                }
                run_block(threads, random);
                const unsigned char *beyond = shared() + shared_bytes;
                if (failed.empty() && std::any_of(beyond, beyond + GUARD, [](unsigned char byte) { return byte != 0xff; }))
                    failed = "a write beyond the shared memory that was asked for";
            }
    return failed;
}

unsigned char *shared() { return shared_memory->data() + (16 - (uintptr_t)shared_memory->data() % 16) % 16; }
void block_barrier() { wait_as(State::AtBlockBarrier); }

void fault(const std::string &what) {
    char where[160];
    snprintf(where, sizeof where, " (block %u, %u, %u, thread %u)", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    throw Fault(what + where);
}

void collective(const char *what, void *mine, const std::function<void(void *const *)> &then) {
    self().what = what;
    self().given = mine;
    self().then = then;
    wait_as(State::AtWarp);
}

void check(const void *p, size_t bytes, size_t alignment, bool writing) {
    const char *from = (const char *)p;
    if ((uintptr_t)p % alignment) fault("an access of " + std::to_string(bytes) + " bytes is not aligned");
    // Shared memory may be read and written the same way, by what does not know which of them it is given.
    const char *beyond = (const char *)shared_memory->data() + shared_memory->size() - GUARD;
    if (from >= (const char *)shared() && from + bytes <= beyond) return;
    for (auto range = ranges->begin(); range != ranges->end(); range++)
        if (range->begin <= from && from + bytes <= range->end && (range->writable || !writing)) {
            std::rotate(ranges->begin(), range, range + 1);
            return;
        }
    fault(std::string(writing ? "a write" : "a read") + " of " + std::to_string(bytes) + " bytes outside the launch's buffers");
}

void start_copy(void *to, const void *from, bool valid) {
    if ((uintptr_t)to % 16) fault("a copy to shared memory is not aligned");
    if (valid) check(from, 16, 16, false);
    memset(to, 0xff, 16); // until it is waited for
    self().started.push_back({to, from, valid});
}

void commit_copies() {
    self().groups.push_back(self().started);
    self().started.clear();
}

void wait_for_copies(int still_running) {
    auto &groups = self().groups;
    while ((int)groups.size() > still_running) {
        for (const Copy &copy : groups.front())
            if (copy.valid) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
        groups.erase(groups.begin());
    }
}

} // namespace emulator

// Runs a kernel over its whole grid. `buffers` are `count` triples of begin, end and whether they may be written. Returns 0, or 1 and
// what went wrong in `message` (256 bytes).
extern "C" int emulator_launch(const char *name, const uint32_t *grid, uint32_t threads, uint32_t shared_bytes, const void *a,
                               const uint64_t *buffers, size_t count, uint32_t seed, char *message) {
    using namespace emulator;
    std::string failed;
    std::vector<Range> known;
    for (size_t i = 0; i < count; i++) known.push_back({(const char *)buffers[3 * i], (const char *)buffers[3 * i + 1], buffers[3 * i + 2] != 0});
    ranges = &known;
    auto kernel = find(name);
    if (!kernel) failed = "there is no kernel of this name";
    else if (threads % 32) failed = "blocks are of whole warps, and of 1024 threads at most";
    else if (shared_bytes > 99 << 10) failed = "not every card has this much shared memory";
    else failed = run({grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared_bytes, kernel->run, a, Trust::Nothing, seed);
    snprintf(message, 256, "%s", failed.c_str());
    return failed.empty() ? 0 : 1;
}
