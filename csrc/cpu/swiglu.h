// The gated activation of an MLP: one call's pointers, sizes and strides (in elements).
#pragma once

#include "matrix.h"

namespace unmask {

struct SwigluCall {
    Matrix gate_up;  // [T, 2 M]: M columns of gate, then M of up; columns contiguous in both matrices
    Matrix out;      // [T, M]
    int threads;
};

}  // namespace unmask
