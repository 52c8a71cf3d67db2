// sample_head on the CPU. Compiled once per instruction set; UNMASK_ISA names the compilation.
//
// A unit of work is a span of noise blocks for a chunk of rows: their logits go into a tile, each block's log-sum-exp
// into a table, and the best block so far of each row, logits included, into the thread's records. When all blocks are
// done the records of the threads are compared and the tokens of the winning block race.
#include "sample_head.h"

#include "../online.h"
#include "product.h"

namespace unmask {
namespace {

// Gumbel noise of blocks 0 … count - 1, a multiple of kLanes.
inline void block_gumbels(RowKey key, int64_t count, float* __restrict out) {
    for (int64_t start = 0; start < count; start += kLanes, out += kLanes)
        for (int i = 0; i < kLanes; ++i) {
            const Words words = philox(key, kBlockRace, static_cast<uint32_t>(start) + i);
            out[i] = gumbel(words.w0, words.w1);
        }
}

// Gumbel noise of the block's ids: the one of id 4 i + w at [w][i].
inline void token_gumbels(RowKey key, int64_t block, float (&out)[4][kBlock / 4]) {
    for (int i = 0; i < kBlock / 4; ++i) {
        const Words words = philox(key, kTokenRace, static_cast<uint32_t>(block) * (kBlock / 4) + i);
        out[0][i] = gumbel(words.w0);
        out[1][i] = gumbel(words.w1);
        out[2][i] = gumbel(words.w2);
        out[3][i] = gumbel(words.w3);
    }
}

// The best block a thread has seen for one row.
struct Record {
    float score;
    int64_t block;
    float logits[kBlock];
};

class Race {
   public:
    explicit Race(const HeadCall& call)
        : call_(call), source_(make_logits(call.head)), chunk_(source_->chunk),
          blocks_(round_up(call.head.vocab(), kBlock) / kBlock), stride_(round_up(blocks_, kLanes)) {}

    void run() {
        const int64_t units = (blocks_ + source_->span - 1) / source_->span;
        threads_ = static_cast<int>(smaller(call_.threads, units));
        const size_t table = chunk_ * stride_, shared = threads_ * chunk_;
        Scratch scratch(source_->bytes() + 2 * Scratch::padded(table * sizeof(float)) +
                        Scratch::padded(shared * sizeof(Record)) + shared * kBlock * sizeof(float));
        source_->allocate(scratch);
        gumbel_ = scratch.take<float>(table);
        lse_ = scratch.take<float>(table);
        records_ = scratch.take<Record>(shared);
        tiles_ = scratch.take<float>(shared * kBlock);
        for (first_ = 0; first_ < call_.head.num_rows; first_ += chunk_) {
            const int64_t rows = smaller(chunk_, call_.head.num_rows - first_);
            source_->start(first_);
            const int few = static_cast<int>(smaller(threads_, (rows + 7) / 8));  // a row alone is soon done
            parallel_for(few, rows, [&](int64_t row, int) { prepare(row); });
            parallel_for(threads_, units, [&](int64_t unit, int thread) {
                const int64_t end = smaller((unit + 1) * source_->span, blocks_);
                for (int64_t block = unit * source_->span; block < end; ++block) race(block, rows, thread);
            });
            parallel_for(few, rows, [&](int64_t row, int) { finish(row); });
        }
    }

   private:
    const HeadCall& call_;
    const std::unique_ptr<Logits> source_;
    const int64_t chunk_, blocks_, stride_;
    int threads_ = 1;
    int64_t first_ = 0;
    float *gumbel_ = nullptr, *lse_ = nullptr;  // [chunk, stride] by block
    Record* records_ = nullptr;                 // [threads, chunk]
    float* tiles_ = nullptr;                    // [threads, chunk, kBlock]

    bool greedy() const { return call_.temperature == 0.0f; }

    RowKey key(int64_t row) const {
        const int64_t* key = call_.keys + 3 * (first_ + row);
        return {static_cast<uint32_t>(key[1]), static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[2]),
                static_cast<uint32_t>(call_.seed), static_cast<uint32_t>(call_.seed >> 32)};
    }

    // The row's noise for every block, and no records yet.
    void prepare(int64_t row) {
        source_->prepare(row);
        if (!greedy()) block_gumbels(key(row), stride_, gumbel_ + row * stride_);
        for (int64_t block = blocks_; block < stride_; ++block) lse_[row * stride_ + block] = -kInfinity;
        for (int thread = 0; thread < threads_; ++thread) {
            records_[thread * chunk_ + row].score = -kInfinity;
            records_[thread * chunk_ + row].block = blocks_;
        }
    }

    void race(int64_t block, int64_t rows, int thread) {
        const int64_t id = block * kBlock, count = smaller(kBlock, call_.head.vocab() - id);
        float* tile = tiles_ + thread * chunk_ * kBlock;
        source_->tile(id, count, rows, tile);
        float max[kMaxChunk], sum[kMaxChunk], lse[kMaxChunk];
        for (int64_t row = 0; row < rows; ++row) {
            float* logits = tile + row * kBlock;
            temper(logits, id, count);
            max[row] = maximum(logits, kBlock);
            sum[row] = sum_exp(logits, kBlock, max[row]);
        }
        for (int64_t row = 0; row < rows; ++row) lse[row] = logsumexp(max[row], sum[row]);
        for (int64_t row = 0; row < rows; ++row) {
            lse_[row * stride_ + block] = lse[row];
            const float score = greedy() ? max[row] : lse[row] + gumbel_[row * stride_ + block];
            Record& record = records_[thread * chunk_ + row];
            if (score > record.score) {  // blocks come in rising order: the lowest of equals stays
                record.score = score;
                record.block = block;
                __builtin_memcpy(record.logits, tile + row * kBlock, sizeof record.logits);
            }
        }
    }

    // Bias, forbidden ids and temperature; -inf after the last id.
    void temper(float* logits, int64_t id, int64_t count) const {
        if (call_.offset) {
            const float* offset = call_.offset + id;
            for (int64_t i = 0; i < count; ++i)
                logits[i] = offset[i] == -kInfinity ? -kInfinity : logits[i] + offset[i];
        }
        if (!greedy() && call_.temperature != 1.0f)
            for (int64_t i = 0; i < count; ++i) logits[i] /= call_.temperature;
        for (int64_t i = count; i < kBlock; ++i) logits[i] = -kInfinity;
    }

    // The winning block among the threads' records, then the race of its tokens.
    void finish(int64_t row) {
        const Record* best = records_ + row;
        for (int thread = 1; thread < threads_; ++thread) {
            const Record* other = records_ + thread * chunk_ + row;
            if (other->score > best->score || (other->score == best->score && other->block < best->block)) best = other;
        }
        const float* lses = lse_ + row * stride_;
        const int n = static_cast<int>(stride_);
        const float max = maximum(lses, n), lse = logsumexp(max, sum_exp(lses, n, max));
        const bool drawable = lse - lse == 0.0f && best->block < blocks_;
        const int winner = drawable ? race_tokens(*best, row) : 0;
        call_.tokens[first_ + row] = drawable ? best->block * kBlock + winner : -1;
        call_.logprob[first_ + row] = drawable ? best->logits[winner] - lse : lse - lse;
        call_.lse[first_ + row] = lse;
    }

    // The token of the winning block, counted from its first id; the lowest of equals.
    int race_tokens(const Record& block, int64_t row) const {
        float gumbels[4][kBlock / 4] = {};
        if (!greedy()) token_gumbels(key(row), block.block, gumbels);
        int winner = 0;
        float best = -kInfinity;
        for (int i = 0; i < kBlock; ++i) {
            const float score = block.logits[i] + gumbels[i % 4][i / 4];
            if (score > best) best = score, winner = i;
        }
        return winner;
    }
};

}  // namespace

void UNMASK_KERNEL(sample_head)(const HeadCall& call) { Race(call).run(); }

}  // namespace unmask
