// sample_head on the CPU: one call's pointers, sizes and strides (in elements), and who can run it.
#pragma once

#include <stdint.h>

namespace unmask {

enum class Type { f32, bf16 };

struct Matrix {
    const void* data = nullptr;
    Type type = Type::f32;
    int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
};

struct HeadCall {
    Matrix hidden;  // [R, D], or the logits [R, V] when weight.data is null
    Matrix weight;  // [V, D], columns contiguous
    const float* offset;  // [V] or null: added to the logits, -inf for an id that cannot be drawn
    const int64_t* keys;  // [R, 3] contiguous: sequence, position, draw
    uint64_t seed;
    float temperature;  // 0: the largest logit
    int threads;
    int64_t* tokens;  // [R]; -1 for a row with a NaN or +inf logit or with nothing to draw
    float* logprob;   // [R]
    float* lse;       // [R]; not finite for such a row

    int64_t rows() const { return hidden.rows; }
    int64_t vocab() const { return weight.data ? weight.rows : hidden.cols; }
};

// One compilation of sample_head.cpp.
struct HeadKernel {
    const char* isa;
    bool supported;  // by this processor
    void (*run)(const HeadCall&);
};

// Fastest first; ends with an entry whose isa is null.
const HeadKernel* head_kernels();

}  // namespace unmask
