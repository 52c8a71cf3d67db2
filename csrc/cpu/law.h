// Tiles of the tempered logits of a head's laws. Included once per instruction set.
#pragma once

#include "product.h"
#include "tempered.h"

namespace unmask {
namespace {

// logit / temperature after bias and forbidden ids; -inf after the last id.
class Law {
   public:
    explicit Law(const TemperedHead& head) : head_(head), source_(make_logits(head.head)) {}

    int64_t chunk() const { return source_->chunk; }  // rows that may be served together
    size_t bytes(int threads) const { return source_->bytes(threads); }
    void allocate(Scratch& scratch, int threads) { source_->allocate(scratch, threads); }
    void start(int64_t first) { source_->start(first_ = first); }  // a chunk; its rows must be prepared
    void prepare(int64_t row) { source_->prepare(row); }

    // Block `block` of the first `rows` rows of the chunk into tile [rows, kBlock].
    void tile(int64_t block, int64_t rows, float* tile, int thread) const {
        const int64_t id = block * kBlock, count = smaller(kBlock, head_.head.vocab() - id);
        source_->tile(id, count, rows, tile, thread);
        for (int64_t row = 0; row < rows; ++row)
            temper(tile + row * kBlock, id, count, head_.temperature[first_ + row]);
    }

   private:
    const TemperedHead head_;
    const std::unique_ptr<Logits> source_;
    int64_t first_ = 0;

    void temper(float* logits, int64_t id, int64_t count, float temperature) const {
        if (head_.offset) {
            const float* offset = head_.offset + id;
            for (int64_t i = 0; i < count; ++i)
                logits[i] = offset[i] == -kInfinity ? -kInfinity : logits[i] + offset[i];
        }
        if (temperature != 0.0f && temperature != 1.0f)
            for (int64_t i = 0; i < count; ++i) logits[i] /= temperature;
        for (int64_t i = count; i < kBlock; ++i) logits[i] = -kInfinity;
    }
};

// exp(x) for x <= 0, and 0 below the smallest normal number.
UNMASK_FN float exp_or_zero(float x) { return x < -87.0f ? 0.0f : exp_nonpositive(x); }

inline int64_t num_blocks(const TemperedHead& head) { return round_up(head.head.vocab(), kBlock) / kBlock; }

}  // namespace
}  // namespace unmask
