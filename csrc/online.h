// Log-sum-exp in an order that depends on nothing but the number of values: sixteen lanes by index, then a fixed tree.
#pragma once

#include "elementary.h"

namespace unmask {

constexpr int kLanes = 16;

struct Larger {
    UNMASK_INLINE float operator()(float a, float b) const { return a > b ? a : b; }  // b when a is NaN
};

struct Sum {
    UNMASK_INLINE float operator()(float a, float b) const { return a + b; }
};

template <int kWidth = kLanes / 2, class Join>
UNMASK_FN float fold(float* lane, Join join) {
    UNMASK_LANES for (int i = 0; i < kWidth; ++i) lane[i] = join(lane[i + kWidth], lane[i]);
    if constexpr (kWidth > 1) return fold<kWidth / 2>(lane, join);
    return lane[0];
}

// The largest of x[0 … n), n a multiple of 16. NaN is skipped.
UNMASK_FN float maximum(const float* x, int n) {
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = -kInfinity;
    for (int start = 0; start < n; start += kLanes)
        UNMASK_LANES for (int i = 0; i < kLanes; ++i) lane[i] = Larger{}(x[start + i], lane[i]);
    return fold(lane, Larger{});
}

// Sum of exp(x - max) over x[0 … n), n a multiple of 16.
UNMASK_FN float sum_exp(const float* x, int n, float max) {
    const float shift = max == -kInfinity ? 0.0f : max;
    float lane[kLanes] = {};
    for (int start = 0; start < n; start += kLanes)
        UNMASK_LANES for (int i = 0; i < kLanes; ++i) lane[i] += exp_nonpositive(x[start + i] - shift);
    return fold(lane, Sum{});
}

// Their log-sum-exp: -inf when all values are -inf, NaN when any is NaN or +inf.
UNMASK_FN float logsumexp(float max, float sum) {
    const float value = max + log_positive(sum);
    return sum == sum ? value : sum;
}

}  // namespace unmask
