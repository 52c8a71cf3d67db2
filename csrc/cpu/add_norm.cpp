// Residual add, norm, modulation and rounding in one pass. Compiled once per instruction set, which UNMASK_ISA names.
// A row's sums run over sixteen lanes by column, then a fixed tree: they do not depend on other rows or on threads.
#include "add_norm.h"

#include <math.h>

#include "../online.h"
#include "pack.h"
#include "parallel.h"

namespace unmask {
namespace {

constexpr int64_t kRows = 16;  // of one unit of work

template <class T>
inline T* row_of(const Matrix& m, int64_t row) {
    return static_cast<T*>(const_cast<void*>(m.data)) + row * m.row_stride;
}

// x[0 … n) in steps of kLanes, the last one shorter.
template <class Body>
inline void for_lanes(int64_t n, Body&& body) {
    int64_t start = 0;
    for (; start + kLanes <= n; start += kLanes)
        UNMASK_LANES for (int i = 0; i < kLanes; ++i) body(start + i, i);
    for (int i = 0; start + i < n; ++i) body(start + i, i);
}

template <class T>
inline void add_row(float* x, const T* delta, const float* gate, int64_t n) {
    if (gate)
        for (int64_t i = 0; i < n; ++i) x[i] += gate[i] * widen(delta[i]);
    else
        for (int64_t i = 0; i < n; ++i) x[i] += widen(delta[i]);
}

template <class T>
inline void write_row(const float* x, float mean, float factor, const AddNormCall& call, int64_t sequence, T* out) {
    const int64_t n = call.residual.cols;
    const float* shift = call.shift.data ? row_of<float>(call.shift, sequence) : nullptr;
    const float* scale = call.scale.data ? row_of<float>(call.scale, sequence) : nullptr;
    float line[256];
    for (int64_t start = 0; start < n; start += 256) {
        const int64_t count = n - start < 256 ? n - start : 256;
        for (int64_t i = 0; i < count; ++i) line[i] = (x[start + i] - mean) * factor * call.weight[start + i];
        if (call.bias)
            for (int64_t i = 0; i < count; ++i) line[i] += call.bias[start + i];
        if (scale)
            for (int64_t i = 0; i < count; ++i) line[i] *= 1 + scale[start + i];
        if (shift)
            for (int64_t i = 0; i < count; ++i) line[i] += shift[start + i];
        for (int64_t i = 0; i < count; ++i) out[start + i] = narrow_to<T>(line[i]);
    }
}

void norm_row(const AddNormCall& call, int64_t row, int64_t sequence) {
    const int64_t n = call.residual.cols;
    float* x = row_of<float>(call.residual, row);
    const float* gate = call.gate.data ? row_of<float>(call.gate, sequence) : nullptr;
    if (call.delta.data && call.delta.type == Type::bf16) add_row(x, row_of<bf16>(call.delta, row), gate, n);
    if (call.delta.data && call.delta.type == Type::f32) add_row(x, row_of<float>(call.delta, row), gate, n);
    float sums[kLanes] = {}, squares[kLanes] = {};
    if (!call.rms) for_lanes(n, [&](int64_t i, int lane) { sums[lane] += x[i]; });
    const float mean = fold(sums, Sum{}) / n;
    for_lanes(n, [&](int64_t i, int lane) { squares[lane] += (x[i] - mean) * (x[i] - mean); });
    const float factor = 1 / sqrtf(fold(squares, Sum{}) / n + call.eps);
    if (call.out.type == Type::bf16)
        write_row(x, mean, factor, call, sequence, row_of<bf16>(call.out, row));
    else
        write_row(x, mean, factor, call, sequence, row_of<float>(call.out, row));
}

}  // namespace

void UNMASK_KERNEL(add_norm)(const AddNormCall& call) {
    parallel_for(call.threads, (call.residual.rows + kRows - 1) / kRows, [&](int64_t unit, int) {
        const int64_t first = unit * kRows;
        int64_t sequence = 0, end = call.row_counts[0];  // of the row's sequence
        for (int64_t row = first; row < first + kRows && row < call.residual.rows; ++row) {
            while (row >= end) end += call.row_counts[++sequence];
            norm_row(call, row, sequence);
        }
    });
}

}  // namespace unmask
