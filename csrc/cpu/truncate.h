// top-k and top-p of a row of logits without sorting it. Included once per instruction set.
#pragma once

#include "../online.h"
#include "product.h"

namespace unmask {
namespace {

// Integers in the order of the floats.
inline uint32_t ordered(float x) {
    const uint32_t bits = as_bits(x);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline float unordered(uint32_t key) { return as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

// A row's blocks, and what a thread needs to truncate them in place. Ids go by falling logit, the lowest id first among
// equals; every id has a weight, and the first ids are kept until their weights reach a target. The threshold is found
// by bisection over the 2^32 floats, each step a pass over the blocks that reach above it.
class Truncation {
   public:
    Truncation(int64_t blocks, Scratch& scratch)
        : blocks_(blocks), stride_(round_up(blocks, kLanes)), max_(scratch.take<float>(stride_)),
          partial_(scratch.take<float>(stride_)), mass_(scratch.take<float>(blocks * kBlock)) {}

    static size_t bytes(int64_t blocks) {
        const size_t table = Scratch::padded(round_up(blocks, kLanes) * sizeof(float));
        return 2 * table + Scratch::padded(blocks * kBlock * sizeof(float));
    }

    // logits [blocks, kBlock]; -inf for what is not kept. A row with NaN or +inf, or without any id, stays as it is.
    void operator()(float* logits, int64_t top_k, float top_p) {
        bool good = true;
        for (int64_t i = 0; i < blocks_ * kBlock; ++i) good &= logits[i] < kInfinity;
        for (int64_t b = 0; b < stride_; ++b) partial_[b] = 0;
        for (int64_t b = 0; b < stride_; ++b) max_[b] = b < blocks_ ? maximum(logits + b * kBlock, kBlock) : -kInfinity;
        largest_ = maximum(max_, static_cast<int>(stride_));
        if (!good || largest_ == -kInfinity) return;
        if (top_k > 0) keep(logits, [](int64_t) { return 1.0f; }, static_cast<float>(top_k));
        if (top_p < 1) {
            for (int64_t i = 0; i < blocks_ * kBlock; ++i) mass_[i] = exp_nonpositive(logits[i] - largest_);
            auto mass = [this](int64_t id) { return mass_[id]; };
            keep(logits, mass, top_p * above(logits, mass, -kInfinity));
        }
    }

   private:
    const int64_t blocks_, stride_;
    float *const max_, *const partial_;  // [stride] by block: an upper bound of its logits; what above() adds up
    float* const mass_;                  // [blocks, kBlock]
    float largest_ = 0;

    // The weight of all ids with logits above the threshold, added in a fixed order: it grows as the threshold falls.
    template <class Weight>
    float above(const float* logits, Weight weight, float threshold) {
        for (int64_t b = 0; b < blocks_; ++b) {
            float lane[kLanes] = {};
            if (max_[b] > threshold)
                for (int64_t start = b * kBlock; start < (b + 1) * kBlock; start += kLanes)
                    UNMASK_LANES for (int i = 0; i < kLanes; ++i) {
                        const float one = weight(start + i);
                        lane[i] += logits[start + i] > threshold ? one : 0.0f;
                    }
            partial_[b] = fold(lane, Sum{});
        }
        float lane[kLanes] = {};
        for (int64_t start = 0; start < stride_; start += kLanes)
            UNMASK_LANES for (int i = 0; i < kLanes; ++i) lane[i] += partial_[start + i];
        return fold(lane, Sum{});
    }

    // Keeps an id if the weight of those before it is below the target, which the first id always is.
    template <class Weight>
    void keep(float* logits, Weight weight, float target) {
        uint32_t low = ordered(-kInfinity), high = ordered(largest_);
        while (low < high) {
            const uint32_t middle = low + (high - low) / 2;
            if (above(logits, weight, unordered(middle)) < target)
                high = middle;
            else
                low = middle + 1;
        }
        const float threshold = unordered(low);
        const float missing = target - above(logits, weight, threshold);
        int64_t quota = -1;  // of the ids at the threshold, which all weigh the same: added up they would round and round
        for (int64_t b = 0; b < blocks_; ++b) {
            float* block = logits + b * kBlock;
            int equals = 0;
            for (int i = 0; i < kBlock; ++i) equals += block[i] == threshold;
            for (int i = 0; i < kBlock; ++i) block[i] = block[i] < threshold ? -kInfinity : block[i];
            for (int i = 0; equals > 0; ++i)
                if (block[i] == threshold) {
                    --equals;
                    if (quota < 0) quota = larger(1, static_cast<int64_t>(__builtin_ceilf(missing / weight(b * kBlock + i))));
                    if (quota > 0)
                        --quota;
                    else
                        block[i] = -kInfinity;
                }
        }
    }
};

}  // namespace
}  // namespace unmask
