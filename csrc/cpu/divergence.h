// divergence on the CPU: the pointers of one call.
#pragma once

#include "tempered.h"

namespace unmask {

struct DivergenceCall {
    TemperedHead a, b;  // as many rows and ids
    int threads;
    float *kl, *entropy;   // [R]; NaN for a bad row
    float *lse_a, *lse_b;  // [R]; not finite where the row is bad
};

}  // namespace unmask
