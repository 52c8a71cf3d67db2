// sample_head on the CPU: the pointers and options of one call.
#pragma once

#include "tempered.h"

namespace unmask {

struct HeadCall {
    TemperedHead logits;   // temperature 0: the largest is taken
    const int32_t* allow;  // [R, ceil(V / 32)] or null: bit i % 32 of word i / 32 is set if id i can be drawn
    int64_t allow_stride;  // of its rows
    const int64_t* keys;   // [R, 3] contiguous: sequence, position, draw
    uint64_t seed;
    int64_t top_k;  // 0: no limit
    float top_p;    // 1: no limit
    int threads;
    int64_t* tokens;  // [R]; -1 for a row with a NaN or +inf logit or with nothing to draw
    float* logprob;   // [R]
    float* lse;       // [R]; not finite for such a row
    // [R], or null where not wanted; NaN and -1 for such a row
    float* max_prob;
    int64_t* argmax;
    float* margin;
    float* entropy;
};

}  // namespace unmask
