// The emulator and, compiled with it, every kernel. One function is called from Rust: emulator_launch.
#include "faulty.cu"
#include "kernels.cu"

thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

enum class State { Ready, AtBlockBarrier, AtWarp, Done };

struct Copy { void *to; const void *from; bool valid; };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 << 10);
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
thread_local ucontext_t scheduler;
thread_local std::vector<unsigned char> *shared_memory;
thread_local const Range *ranges;
thread_local size_t range_count;
thread_local void (*body)(const void *);
thread_local const void *arguments;
thread_local std::string *failure;

std::map<std::string, void (*)(const void *)> &kernels() {
    static std::map<std::string, void (*)(const void *)> all;
    return all;
}

Fiber &self() { return (*fibers)[current]; }

void wait_as(State state) {
    self().state = state;
    swapcontext(&self().context, &scheduler);
}

void enter() {
    try {
        body(arguments);
    } catch (const Fault &fault) {
        if (failure->empty()) *failure = fault.what();
    }
    self().state = State::Done;
    swapcontext(&self().context, &scheduler);
}

// Runs each of these threads until it waits for others. Whether any could run.
bool run(const std::vector<uint32_t> &threads) {
    bool ran = false;
    for (uint32_t i : threads) {
        if ((*fibers)[i].state != State::Ready || !failure->empty()) continue;
        ran = true;
        current = i;
        threadIdx = {i, 0, 0};
        swapcontext(&scheduler, &(*fibers)[i].context);
    }
    return ran;
}

// Lets the lanes of a warp go on that all have come to the same place. Whether they had.
bool meet(uint32_t warp) {
    auto begin = fibers->begin() + 32 * warp, end = begin + 32;
    if (!std::all_of(begin, end, [](const Fiber &fiber) { return fiber.state == State::AtWarp; })) return false;
    if (!std::all_of(begin, end, [&](const Fiber &fiber) { return !strcmp(fiber.what, begin->what); })) {
        *failure = std::string("lanes of a warp meet in ") + begin->what + " and elsewhere";
        return false;
    }
    void *given[32];
    for (int i = 0; i < 32; i++) given[i] = begin[i].given;
    begin->then(given);
    for (auto fiber = begin; fiber != end; fiber++) fiber->state = State::Ready;
    return true;
}

void run_block(uint32_t threads, std::mt19937 &random) {
    std::vector<uint32_t> order(threads);
    for (uint32_t i = 0; i < threads; i++) {
        Fiber &fiber = (*fibers)[order[i] = i];
        fiber.state = State::Ready;
        fiber.groups.clear();
        fiber.started.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    // A NaN in every float, so that reading what nobody wrote shows.
    std::fill(shared_memory->begin(), shared_memory->end(), 0xff);
    // Half of all launches run one warp at a time as far as it can go, so that warps run ahead of each other by all that barriers allow;
    // the others run all threads from one meeting to the next.
    bool ahead = random() % 2 == 0;
    std::vector<uint32_t> warps(threads / 32);
    for (uint32_t i = 0; i < threads / 32; i++) warps[i] = i;
    while (failure->empty()) {
        bool ran = false;
        std::shuffle(warps.begin(), warps.end(), random);
        std::shuffle(order.begin(), order.end(), random);
        if (!ahead) ran = run(order);
        for (uint32_t warp : warps) {
            std::vector<uint32_t> lanes(32);
            for (int i = 0; i < 32; i++) lanes[i] = 32 * warp + i;
            std::shuffle(lanes.begin(), lanes.end(), random);
            do ran = (ahead && run(lanes)) || ran;
            while (failure->empty() && meet(warp) && ((ran = true)) && ahead);
        }
        if (!failure->empty()) return;
        auto in = [&](State state) {
            return (size_t)std::count_if(fibers->begin(), fibers->end(), [=](const Fiber &fiber) { return fiber.state == state; });
        };
        if (in(State::Done) == threads) return;
        if (in(State::AtBlockBarrier) == threads) {
            for (Fiber &fiber : *fibers) fiber.state = State::Ready;
            ran = true;
        }
        if (!ran) *failure = "not all threads reach a barrier";
    }
}

} // namespace

void list(const char *name, void (*kernel)(const void *)) { kernels()[name] = kernel; }
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
    for (size_t i = 0; i < range_count; i++)
        if (ranges[i].begin <= from && from + bytes <= ranges[i].end && (ranges[i].writable || !writing)) return;
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
    auto kernel = kernels().find(name);
    if (kernel == kernels().end()) failed = "there is no kernel of this name";
    else if (threads == 0 || threads % 32 || threads > 1024) failed = "blocks are of whole warps, and of 1024 threads at most";
    else if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[1] > 65535 || grid[2] > 65535) failed = "a card refuses this grid";
    else if (shared_bytes > 99 << 10) failed = "not every card has this much shared memory";
    else {
        std::vector<Fiber> all(threads);
        std::vector<unsigned char> memory(shared_bytes + 16 + GUARD);
        std::mt19937 random(seed);
        fibers = &all, shared_memory = &memory, ranges = known.data(), range_count = known.size();
        body = kernel->second, arguments = a, failure = &failed;
        blockDim = {threads, 1, 1}, gridDim = {grid[0], grid[1], grid[2]};
        for (uint32_t z = 0; z < grid[2]; z++)
            for (uint32_t y = 0; y < grid[1]; y++)
                for (uint32_t x = 0; x < grid[0] && failed.empty(); x++) {
                    blockIdx = {x, y, z};
                    run_block(threads, random);
                    const unsigned char *beyond = shared() + shared_bytes;
                    if (failed.empty() && std::any_of(beyond, beyond + GUARD, [](unsigned char byte) { return byte != 0xff; }))
                        failed = "a write beyond the shared memory that was asked for";
                }
    }
    snprintf(message, 256, "%s", failed.c_str());
    return failed.empty() ? 0 : 1;
}
