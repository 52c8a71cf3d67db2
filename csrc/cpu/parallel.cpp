#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <new>

namespace unmask {
namespace {

// libgomp's entry points. torch loads the library globally, and every torch operator on this thread uses the same pool.
struct Runtime {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
    int (*thread)();

    Runtime() {
        parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread = reinterpret_cast<decltype(thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    }
};

struct Job {
    void (*body)(void*, int64_t, int);
    void* context;
    int64_t units;
    int (*thread)();
    std::atomic<int64_t> next{0};

    void work(int thread) {
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) body(context, unit, thread);
    }
};

}  // namespace

void parallel(int threads, int64_t units, void (*body)(void*, int64_t, int), void* context) {
    static const Runtime runtime;
    Job job{body, context, units, runtime.thread};
    if (threads > units) threads = static_cast<int>(units);
    if (threads < 2 || !runtime.parallel || !runtime.thread) return job.work(0);
    auto enter = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        job.work(job.thread());
    };
    runtime.parallel(enter, &job, static_cast<unsigned>(threads), 0);
}

Scratch::Scratch(size_t bytes) {
    memory_ = static_cast<char*>(::operator new(padded(bytes), std::align_val_t{64}));
    next_ = memory_;
}

Scratch::~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }

}  // namespace unmask
