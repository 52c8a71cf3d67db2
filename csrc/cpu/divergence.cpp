// divergence on the CPU. Compiled once per instruction set; UNMASK_ISA names the compilation.
//
// KL and entropy obey a chain rule: of the laws inside each noise block first, then of the law over the blocks. A unit
// of work is a block for a chunk of rows; each leaves four numbers of a row in a table.
#include "divergence.h"

#include "../online.h"
#include "law.h"

namespace unmask {
namespace {

// What a block, or a row, has of two laws.
struct Pair {
    float lse_a, lse_b, kl, entropy;
};

// d + exp(-d) - 1 for |d| < 1/2, to a relative 2e-9.
UNMASK_FN float excess(float d) {
    float p = -1.0f / 362880;
    p = p * d + 1.0f / 40320;
    p = p * d - 1.0f / 5040;
    p = p * d + 1.0f / 720;
    p = p * d - 1.0f / 120;
    p = p * d + 1.0f / 24;
    p = p * d - 1.0f / 6;
    p = p * d + 0.5f;
    return p * (d * d);
}

// KL and entropy over n outcomes, a multiple of 16, with log-weights a and b; of outcomes which are laws themselves
// those of their insides come on top. With p and q the two probabilities and d = log p - log q, a term of KL is
// p (d + exp(-d) - 1) = p d + q - p, never negative: what it adds to p d sums to zero.
template <bool kInsides>
inline Pair compare(const float* a, const float* b, int n, const float* kls = nullptr,
                    const float* entropies = nullptr) {
    const float max_a = maximum(a, n), max_b = maximum(b, n);
    const float lse_a = logsumexp(max_a, sum_exp(a, n, max_a)), lse_b = logsumexp(max_b, sum_exp(b, n, max_b));
    if (lse_a == -kInfinity) return {lse_a, lse_b, 0.0f, 0.0f};
    const float shift_b = lse_b == -kInfinity ? 0.0f : lse_b;
    float kl[kLanes] = {}, entropy[kLanes] = {};
    for (int start = 0; start < n; start += kLanes)
        UNMASK_LANES for (int i = 0; i < kLanes; ++i) {
            const float x = a[start + i], y = b[start + i];
            const float log_p = x - lse_a, log_q = y - shift_b, d = log_p - log_q;
            const float p = exp_or_zero(log_p), q = exp_or_zero(log_q);
            const float inside = kInsides ? kls[start + i] : 0.0f, spread = kInsides ? entropies[start + i] : 0.0f;
            float term = (d < 0.5f && d > -0.5f ? p * excess(d) : p * d + (q - p)) + p * inside;
            term = y == -kInfinity || inside == kInfinity ? kInfinity : term;  // possible under a alone
            kl[i] += x == -kInfinity ? q : term;
            entropy[i] += p == 0.0f ? 0.0f : p * (spread - log_p);
        }
    return {lse_a, lse_b, fold(kl, Sum{}), fold(entropy, Sum{})};
}

class Comparison {
   public:
    explicit Comparison(const DivergenceCall& call)
        : call_(call), a_(call.a), b_(call.b), chunk_(smaller(a_.chunk(), b_.chunk())), blocks_(num_blocks(call.a)),
          stride_(round_up(blocks_, kLanes)) {}

    void run() {
        const int64_t table = chunk_ * stride_;
        const int threads = static_cast<int>(smaller(call_.threads, blocks_));
        Scratch scratch(a_.bytes(threads) + b_.bytes(threads) + 4 * Scratch::padded(table * sizeof(float)) +
                        2 * threads * chunk_ * kBlock * sizeof(float));
        a_.allocate(scratch, threads);
        b_.allocate(scratch, threads);
        lse_a_ = scratch.take<float>(table);
        lse_b_ = scratch.take<float>(table);
        kl_ = scratch.take<float>(table);
        entropy_ = scratch.take<float>(table);
        tiles_ = scratch.take<float>(2 * threads * chunk_ * kBlock);
        for (first_ = 0; first_ < call_.a.head.num_rows; first_ += chunk_) {
            rows_ = smaller(chunk_, call_.a.head.num_rows - first_);
            a_.start(first_);
            b_.start(first_);
            const int few = static_cast<int>(smaller(threads, (rows_ + 7) / 8));  // a row alone is soon done
            parallel_for(few, rows_, [&](int64_t row, int) { prepare(row); });
            parallel_for(threads, blocks_, [&](int64_t block, int thread) { compare_block(block, thread); });
            parallel_for(few, rows_, [&](int64_t row, int) { finish(row); });
        }
    }

   private:
    const DivergenceCall& call_;
    Law a_, b_;
    const int64_t chunk_, blocks_, stride_;
    int64_t first_ = 0, rows_ = 0;
    float *lse_a_ = nullptr, *lse_b_ = nullptr, *kl_ = nullptr, *entropy_ = nullptr;  // [chunk, stride] by block
    float* tiles_ = nullptr;                                                          // [threads, 2, chunk, kBlock]

    void store(int64_t row, int64_t block, const Pair& pair) {
        const int64_t i = row * stride_ + block;
        lse_a_[i] = pair.lse_a, lse_b_[i] = pair.lse_b, kl_[i] = pair.kl, entropy_[i] = pair.entropy;
    }

    void prepare(int64_t row) {
        a_.prepare(row);
        b_.prepare(row);
        for (int64_t block = blocks_; block < stride_; ++block) store(row, block, {-kInfinity, -kInfinity, 0.0f, 0.0f});
    }

    void compare_block(int64_t block, int thread) {
        float *a = tiles_ + 2 * thread * chunk_ * kBlock, *b = a + chunk_ * kBlock;
        a_.tile(block, rows_, a, thread);
        b_.tile(block, rows_, b, thread);
        for (int64_t row = 0; row < rows_; ++row)
            store(row, block, compare<false>(a + row * kBlock, b + row * kBlock, kBlock));
    }

    void finish(int64_t row) {
        const int64_t i = row * stride_, to = first_ + row;
        const Pair pair = compare<true>(lse_a_ + i, lse_b_ + i, static_cast<int>(stride_), kl_ + i, entropy_ + i);
        const float bad = (pair.lse_a - pair.lse_a) + (pair.lse_b - pair.lse_b);  // 0, or NaN
        call_.kl[to] = bad == 0.0f ? pair.kl : bad;
        call_.entropy[to] = bad == 0.0f ? pair.entropy : bad;
        call_.lse_a[to] = pair.lse_a;
        call_.lse_b[to] = pair.lse_b;
    }
};

}  // namespace

void UNMASK_KERNEL(divergence)(const DivergenceCall& call) { Comparison(call).run(); }

}  // namespace unmask
