// A dense matrix given by pointer, sizes and strides (in elements).
#pragma once

#include <stdint.h>

namespace unmask {

enum class Type { f32, bf16, f16 };

struct Matrix {
    const void* data = nullptr;
    Type type = Type::f32;
    int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
};

// Rows and the LM head that turns them into logits.
struct Head {
    Matrix hidden;                  // [N, D], or the logits [N, V] when weight.data is null
    Matrix weight;                  // [V, D], columns contiguous
    const int64_t* rows = nullptr;  // [R]: row r is hidden[rows[r]]; null: R = N
    int64_t num_rows = 0;           // R

    int64_t row(int64_t r) const { return rows ? rows[r] : r; }
    int64_t vocab() const { return weight.data ? weight.rows : hidden.cols; }
};

}  // namespace unmask
