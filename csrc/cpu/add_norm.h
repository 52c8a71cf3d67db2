// Residual add, layer norm or RMSNorm, modulation and rounding in one pass: one call's pointers, sizes and strides (in elements).
#pragma once

#include <stdint.h>

#include "matrix.h"

namespace unmask {

struct AddNormCall {
    Matrix residual;  // fp32 [T, D], updated in place; columns contiguous in every matrix
    Matrix delta;     // [T, D] or no data
    Matrix out;       // [T, D], may be delta
    const float *weight, *bias;  // [D]; bias may be null
    Matrix gate, shift, scale;   // fp32 [B, D] by sequence, or no data
    const int64_t* row_counts;   // [B]: rows of each sequence
    int64_t num_sequences;
    float eps;
    bool rms;  // no mean is taken off
    int threads;
};

}  // namespace unmask
