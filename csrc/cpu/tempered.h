// Rows, their head, and what is done to the logits before they make a law.
#pragma once

#include "matrix.h"

namespace unmask {

struct TemperedHead {
    Head head;
    const float* offset = nullptr;       // [V] or null: added to the logits, -inf for an impossible id
    const float* temperature = nullptr;  // [R]: divides them then, unless it is 0
};

}  // namespace unmask
