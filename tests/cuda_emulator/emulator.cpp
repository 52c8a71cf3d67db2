#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace unmask::emulator {

int multiprocessors = 4, shared_bytes = 232448;

namespace {

enum class Order { rising, falling, random };
enum class Landing { late, early, random };  // of asynchronous copies: at the wait, at once
Order order = Order::rising;
Landing landing = Landing::late;
unsigned seed = 0;
int launches = 0;

constexpr size_t kStack = 128 << 10;
constexpr uint32_t kLast = 1u << 31;

struct Copy {
    char* to;
    const void* from;
    int bytes;

    void land() const {
        memcpy(to, from, bytes);
        memset(to + bytes, 0, 16 - bytes);
    }
};

struct Store {
    void* to;
    char value[8];
    int bytes;
};

struct Cta;

struct Thread {
    Cta* cta = nullptr;
    int index = 0, id = 0;  // in the CTA, in the grid
    bool started = false, waits = false, done = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t context;
    jmp_buf place;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    std::vector<Store> unpublished;
};

struct Warp {
    const char* name = nullptr;
    int arrived = 0;
    void* operands[32];
};

struct Cta {
    int index = 0, alive = 0, waiting = 0;
    std::unique_ptr<char[]> shared;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
};

// One launch: its threads, which of them can go on, and who goes next.
struct Grid {
    Launch launch;
    std::vector<Cta> ctas;
    std::set<std::pair<uint32_t, Thread*>> ready;
    std::mt19937 random{seed};
    Thread* current = nullptr;
    jmp_buf home;
    std::string failure;

    uint32_t priority(const Thread& thread) {
        return order == Order::random ? random() / 2 : order == Order::rising ? thread.id : kLast - 1 - thread.id;
    }
    void wake(Thread& thread) { ready.insert({priority(thread), &thread}); }
    void wake_last(Thread& thread) { ready.insert({kLast + priority(thread), &thread}); }
};
Grid* grid = nullptr;

void enter() {
    grid->launch.run(grid->launch.arguments);
    grid->current->done = true;
    _longjmp(grid->home, 1);
}

void suspend() {
    if (_setjmp(grid->current->place) == 0) _longjmp(grid->home, 1);
}

void resume(Thread& thread) {
    grid->current = &thread;
    if (_setjmp(grid->home)) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, enter, 0);
    setcontext(&thread.context);
}

void release_barrier(Cta& cta) {
    if (cta.waiting == 0 || cta.waiting < cta.alive) return;
    cta.waiting = 0;
    for (Thread& thread : cta.threads)
        if (thread.waits) thread.waits = false, grid->wake(thread);
}

void publish_all(Thread& thread) {
    for (const Store& store : thread.unpublished) memcpy(store.to, store.value, store.bytes);
    thread.unpublished.clear();
}

void prepare(Cta& cta, int index) {
    cta.index = index;
    cta.alive = grid->launch.threads;
    cta.shared.reset(new char[grid->launch.shared_bytes + 128]);
    memset(cta.shared.get(), 0xff, grid->launch.shared_bytes + 128);  // NaN
    cta.threads = std::vector<Thread>(cta.alive);
    cta.warps.resize(cta.alive / 32);
    for (int i = 0; i < cta.alive; ++i) {
        cta.threads[i].cta = &cta;
        cta.threads[i].index = i;
        cta.threads[i].id = index * cta.alive + i;
        grid->wake(cta.threads[i]);
    }
}

float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

}  // namespace

int thread_index() { return grid->current->index; }
int cta_index() { return grid->current->cta->index; }
int num_ctas() { return grid->launch.ctas; }

char* shared_memory() {
    char* start = grid->current->cta->shared.get();
    return start + (128 - reinterpret_cast<uintptr_t>(start) % 128) % 128;
}

void fail(const char* message) {
    grid->failure = message;
    _longjmp(grid->home, 1);
    __builtin_unreachable();
}

void yield() {
    grid->wake(*grid->current);
    suspend();
}

void stall() {
    grid->wake_last(*grid->current);
    suspend();
}

void sync_threads() {
    Thread& thread = *grid->current;
    thread.waits = true;
    ++thread.cta->waiting;
    release_barrier(*thread.cta);
    suspend();
}

void meet(const char* name, void* operands, void (*run)(void* const (&lanes)[32])) {
    Thread& thread = *grid->current;
    Warp& warp = thread.cta->warps[thread.index / 32];
    if (warp.arrived > 0 && strcmp(warp.name, name) != 0) fail("the lanes of a warp are in different instructions");
    warp.name = name;
    warp.operands[thread.index % 32] = operands;
    if (++warp.arrived < 32) return suspend();
    warp.arrived = 0;
    run(warp.operands);
    for (int lane = 0; lane < 32; ++lane) {
        Thread& other = thread.cta->threads[thread.index / 32 * 32 + lane];
        if (&other != &thread) grid->wake(other);
    }
}

void copy_async(uint32_t to, const void* from, int bytes) {
    if (to % 16 || to + 16 > static_cast<uint32_t>(grid->launch.shared_bytes)) fail("a copy lands at a bad address");
    if (bytes < 0 || bytes > 16) fail("a copy must have 0 to 16 bytes");
    if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16) fail("a copy must start on 16 bytes");
    const Copy copy{shared_memory() + to, from, bytes};
    if (landing == Landing::early || (landing == Landing::random && grid->random() % 2))
        copy.land();
    else
        grid->current->open.push_back(copy);
}

void commit_copies() {
    Thread& thread = *grid->current;
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

void wait_copies(int pending) {
    auto& groups = grid->current->groups;
    const int complete = static_cast<int>(groups.size()) - pending;
    if (complete <= 0) return;
    for (int i = 0; i < complete; ++i)
        for (const Copy& copy : groups[i]) copy.land();
    groups.erase(groups.begin(), groups.begin() + complete);
}

void publish(void* to, const void* value, int bytes) {
    Store store{to, {}, bytes};
    memcpy(store.value, value, bytes);
    grid->current->unpublished.push_back(store);
}

void fence() {
    publish_all(*grid->current);
    yield();
}

void shuffle_xor(void* const (&lanes)[32]) {
    char before[32][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Shuffle& own = *static_cast<Shuffle*>(lanes[lane]);
        memcpy(before[lane], own.value, own.bytes);
    }
    for (int lane = 0; lane < 32; ++lane) {
        const Shuffle& own = *static_cast<Shuffle*>(lanes[lane]);
        memcpy(own.value, before[lane ^ own.lane_mask], own.bytes);
    }
}

float widen_bf16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

float widen_fp16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float value = rest >= 0x400 ? from_bits((rest << 13) + (112u << 23)) : static_cast<float>(rest) * 0x1p-24f;
    return sign ? -value : value;
}

void launch(const Launch& what) {
    Grid own{what};
    grid = &own;
    ++launches;
    if (what.shared_bytes > shared_bytes) throw std::runtime_error("emulator: too much shared memory");
    own.ctas.resize(what.ctas);
    for (int i = 0; i < what.ctas; ++i) prepare(own.ctas[i], i);
    while (!own.ready.empty() && own.failure.empty()) {
        Thread& next = *own.ready.begin()->second;
        own.ready.erase(own.ready.begin());
        resume(next);
        if (!next.done || !own.failure.empty()) continue;
        --next.cta->alive;
        release_barrier(*next.cta);
    }
    if (!own.failure.empty()) throw std::runtime_error("emulator: " + own.failure);
    for (Cta& cta : own.ctas)
        for (Thread& thread : cta.threads) {
            if (!thread.done) throw std::runtime_error("emulator: threads wait for each other forever");
            if (!thread.open.empty()) throw std::runtime_error("emulator: copies are never committed");
            publish_all(thread);
        }
}

}  // namespace unmask::emulator

using namespace unmask::emulator;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_configure(int new_order, int new_landing, unsigned new_seed, int new_multiprocessors,
                               int new_shared_bytes) {
    order = static_cast<Order>(new_order);
    landing = static_cast<Landing>(new_landing);
    seed = new_seed;
    multiprocessors = new_multiprocessors;
    shared_bytes = new_shared_bytes;
}

EXPORT int emulator_launches() { return launches; }
