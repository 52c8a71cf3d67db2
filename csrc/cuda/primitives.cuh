// Every instruction of a GPU that the kernels use, one short function each. Shared memory is addressed by its byte
// offset. With UNMASK_EMULATOR defined the same names come from tests/cuda_emulator, where threads are fibers of a CPU.
#pragma once

#include <stdint.h>

#ifdef UNMASK_EMULATOR
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define UNMASK_DEVICE __device__ __forceinline__
#define UNMASK_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define UNMASK_PARAMETER __grid_constant__ const

namespace unmask::cuda {

UNMASK_DEVICE int thread_index() { return threadIdx.x; }
UNMASK_DEVICE int cta_index() { return blockIdx.x; }
UNMASK_DEVICE int num_ctas() { return gridDim.x; }

UNMASK_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char bytes[];
    return bytes;
}
UNMASK_DEVICE uint32_t shared_base() { return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())); }

UNMASK_DEVICE void sync_threads() { __syncthreads(); }

template <class T>
UNMASK_DEVICE T shuffle_xor(T value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Starts copying `bytes` (0 … 16) bytes to shared memory and zeros to the rest of sixteen.
UNMASK_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_base() + to), "l"(from),
                 "r"(bytes)
                 : "memory");
}

// Closes the group of copies started by this thread since the last call.
UNMASK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are unfinished.
template <int kPending>
UNMASK_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Two or four 8x8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
UNMASK_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_base() + from)
                 : "memory");
}
UNMASK_DEVICE void load_matrices(uint32_t (&to)[2], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_base() + from)
                 : "memory");
}

// 2^x to two units in the last place, 0 where that is below the normal numbers.
UNMASK_DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct Bf16 {};
struct Fp16 {};

// c += a b: a [16, 16] by rows, b [16, 8] by columns, c [16, 8] in fp32.
UNMASK_DEVICE void multiply_add(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
UNMASK_DEVICE void multiply_add(Fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Both return what was there before.
UNMASK_DEVICE uint32_t atomic_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
UNMASK_DEVICE uint64_t atomic_max(uint64_t* to, uint64_t value) {
    return atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// What a thread publishes before a fence and an atomic_add, the CTA that sees the sum and then fences can read.
UNMASK_DEVICE void fence() { __threadfence(); }
template <class T>
UNMASK_DEVICE void publish(T* to, T value) {
    *to = value;
}
template <class T>
UNMASK_DEVICE T read_published(const T* from) {
    return __ldcg(from);
}
UNMASK_DEVICE uint64_t read_published(const uint64_t* from) {
    return __ldcg(reinterpret_cast<const unsigned long long*>(from));
}

inline void check(cudaError_t code, const char* call) {
    if (code != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(code));
}

// Makes `device` current for a scope.
class OnDevice {
   public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = device != before_;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

   private:
    int before_ = 0;
    bool changed_ = false;
};

struct Limits {
    int multiprocessors, shared_bytes;  // of the device, of one CTA
};

inline Limits device_limits(int device) {
    Limits limits{};
    check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
    return limits;
}

template <class Arguments>
void launch(void (*kernel)(Arguments), int ctas, int threads, int shared_bytes, void* stream,
            const Arguments& arguments) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "cudaFuncSetAttribute");
    void* pointers[] = {const_cast<Arguments*>(&arguments)};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(ctas), dim3(threads), pointers, shared_bytes,
                           static_cast<cudaStream_t>(stream)),
          "cudaLaunchKernel");
}

}  // namespace unmask::cuda
#endif
