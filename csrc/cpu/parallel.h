// Loops on torch's own thread pool, without a second OpenMP runtime and without torch headers.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace unmask {

// body(context, unit, thread) for every unit in [0, units), handed out in rising order to at most `threads` threads;
// thread is in [0, threads). Runs serially where the process has no OpenMP runtime loaded.
void parallel(int threads, int64_t units, void (*body)(void* context, int64_t unit, int thread), void* context);

template <class Body>
static inline void parallel_for(int threads, int64_t units, Body&& body) {
    auto call = [](void* context, int64_t unit, int thread) { (*static_cast<Body*>(context))(unit, thread); };
    parallel(threads, units, call, &body);
}

// Cache-line aligned memory, freed at the end of the scope. Throws std::bad_alloc.
class Scratch {
   public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    T* take(size_t count) {
        T* start = reinterpret_cast<T*>(next_);
        next_ += padded(count * sizeof(T));
        return start;
    }
    static constexpr size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

   private:
    char *memory_, *next_;
};

}  // namespace unmask
