// expected_embedding on the CPU: the pointers of one call.
#pragma once

#include "tempered.h"

namespace unmask {

struct EmbeddingCall {
    TemperedHead logits;
    Matrix table;  // [V, E], any strides
    int threads;
    float* embedding;  // [R, E] contiguous
    float* lse;        // [R]; not finite for a bad row, whose embedding is NaN
};

}  // namespace unmask
