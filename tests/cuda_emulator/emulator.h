// The names of csrc/cuda/primitives.cuh on a CPU: every thread of a GPU is a fiber, and everything a GPU may do late,
// early or in another order happens late, early or in another order on request.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <stdexcept>

#define UNMASK_DEVICE inline
#define UNMASK_KERNEL(threads) void
#define UNMASK_PARAMETER const

namespace unmask::emulator {

int thread_index();
int cta_index();
int num_ctas();
char* shared_memory();
void sync_threads();
void yield();  // to any other thread
void stall();  // until all other threads wait, for whatever it may be

// Blocks until the 32 lanes of the warp meet in the instruction `name`, then runs it once on all their operands.
void meet(const char* name, void* operands, void (*run)(void* const (&lanes)[32]));

void copy_async(uint32_t to, const void* from, int bytes);
void commit_copies();
void wait_copies(int pending);
void fence();
void publish(void* to, const void* value, int bytes);
[[noreturn]] void fail(const char* message);

struct Matrices {
    uint32_t* to;
    const char* from;
};
template <int count>
void load_matrices(void* const (&lanes)[32]) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < count; ++i)
            memcpy(static_cast<Matrices*>(lanes[lane])->to + i,
                   static_cast<Matrices*>(lanes[8 * i + lane / 4])->from + lane % 4 * 4, 4);
}

struct Product {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};
float widen_bf16(uint16_t bits);
float widen_fp16(uint16_t bits);

// Fragments as the PTX manual lays them out for mma.m16n8k16.
template <float (*widen)(uint16_t)>
void multiply_add(void* const (&lanes)[32]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Product& own = *static_cast<Product*>(lanes[lane]);
        for (int half = 0; half < 2; ++half) {
            const int inner = lane % 4 * 2 + half, outer = lane / 4;
            for (int i = 0; i < 4; ++i)
                a[outer + i % 2 * 8][inner + i / 2 * 8] = widen(static_cast<uint16_t>(own.a[i] >> 16 * half));
            for (int i = 0; i < 2; ++i) b[inner + i * 8][outer] = widen(static_cast<uint16_t>(own.b[i] >> 16 * half));
        }
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            float& c = static_cast<Product*>(lanes[lane])->c[i];
            for (int k = 0; k < 16; ++k) c += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
        }
}

struct Shuffle {
    void* value;
    int lane_mask, bytes;
};
void shuffle_xor(void* const (&lanes)[32]);

struct Launch {
    void (*run)(const void* arguments);
    const void* arguments;
    int ctas, threads, shared_bytes;
};
void launch(const Launch& what);

extern int multiprocessors, shared_bytes;

}  // namespace unmask::emulator

namespace unmask::cuda {

using emulator::commit_copies;
using emulator::copy_async;
using emulator::cta_index;
using emulator::fence;
using emulator::num_ctas;
using emulator::shared_memory;
using emulator::sync_threads;
using emulator::thread_index;

template <class T>
T shuffle_xor(T value, int lane_mask) {
    emulator::Shuffle own{&value, lane_mask, sizeof value};
    emulator::meet("shuffle_xor", &own, emulator::shuffle_xor);
    return value;
}

template <int kPending>
void wait_copies() {
    emulator::wait_copies(kPending);
}

template <size_t kCount>
void load_matrices(uint32_t (&to)[kCount], uint32_t from) {
    if (from % 16) emulator::fail("a row of a matrix must lie on 16 bytes");
    emulator::Matrices own{to, shared_memory() + from};
    emulator::meet("load_matrices", &own, emulator::load_matrices<kCount>);
}

inline float exp2_approximate(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

struct Bf16 {};
struct Fp16 {};
inline void multiply_add(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Product own{c, a, {b0, b1}};
    emulator::meet("multiply_add", &own, emulator::multiply_add<emulator::widen_bf16>);
}
inline void multiply_add(Fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Product own{c, a, {b0, b1}};
    emulator::meet("multiply_add", &own, emulator::multiply_add<emulator::widen_fp16>);
}

inline uint32_t atomic_add(uint32_t* to, uint32_t value) {
    emulator::yield();
    const uint32_t before = *to;
    *to += value;
    emulator::stall();
    return before;
}
inline uint64_t atomic_max(uint64_t* to, uint64_t value) {
    emulator::yield();
    const uint64_t before = *to;
    if (value > before) *to = value;
    return before;
}

template <class T>
void publish(T* to, T value) {
    emulator::publish(to, &value, sizeof value);
}
template <class T>
T read_published(const T* from) {
    return *from;
}

struct OnDevice {
    explicit OnDevice(int) {}
};
struct Limits {
    int multiprocessors, shared_bytes;
};
inline Limits device_limits(int) { return {emulator::multiprocessors, emulator::shared_bytes}; }

template <class Arguments>
void launch(void (*kernel)(Arguments), int ctas, int threads, int shared_bytes, void*, const Arguments& arguments) {
    static thread_local void (*run)(Arguments);
    run = kernel;
    emulator::launch({[](const void* a) { run(*static_cast<const Arguments*>(a)); }, &arguments, ctas, threads,
                      shared_bytes});
}

}  // namespace unmask::cuda
