// sample_head on the CPU: the pointers and options of one call.
#pragma once

#include "matrix.h"

namespace unmask {

struct HeadCall {
    Head head;
    const float* offset;  // [V] or null: added to the logits, -inf for an id that cannot be drawn
    const int64_t* keys;  // [R, 3] contiguous: sequence, position, draw
    uint64_t seed;
    float temperature;  // 0: the largest logit
    int threads;
    int64_t* tokens;  // [R]; -1 for a row with a NaN or +inf logit or with nothing to draw
    float* logprob;   // [R]
    float* lse;       // [R]; not finite for such a row
};

}  // namespace unmask
