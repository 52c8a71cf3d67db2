// Attention on the CPU: one call's pointers, sizes and strides (in elements).
#pragma once

#include <stdint.h>

#include "matrix.h"

namespace unmask {

// [tokens, heads, dim], dims contiguous.
struct Heads {
    void* data = nullptr;
    int64_t token_stride = 0, head_stride = 0;
};

// Sequences lie back to back: `lengths[s]` keys and `row_counts[s]` queries of sequence s.
struct AttentionCall {
    Type type;  // of query, key, value and out
    Heads query, key, value, out;
    int64_t num_heads, num_groups, dim;  // num_heads / num_groups consecutive heads share one of key and value
    float scale;
    int64_t num_sequences;
    const int64_t *lengths, *row_counts;  // [num_sequences]
    const float *cos, *sin;               // [positions, dim / 2], or null: no rotation
    const int64_t* positions;             // [queries], or null: query i of a sequence stands at position i
    int64_t block;                        // the query at p sees keys before (p / block + 1) * block; 0: every key
    int threads;
};

}  // namespace unmask
