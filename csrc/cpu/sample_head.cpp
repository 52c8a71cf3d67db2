// sample_head on the CPU. Compiled once per instruction set; UNMASK_ISA names the compilation.
//
// A unit of work is a noise block for a chunk of rows: their logits go into a tile, each block's log-sum-exp into a
// table, and the best block so far of each row, logits included, into the thread's records. When all blocks are done the
// records of the threads are compared and the tokens of the winning block race. Rows to be truncated (top-k, top-p) have
// all their logits in a workspace first; then each is one unit.
#include "sample_head.h"

#include <vector>

#include "../online.h"
#include "law.h"
#include "truncate.h"

namespace unmask {
namespace {

constexpr int64_t kWorkspace = 16 << 20;  // bytes of logits to be truncated, of all threads

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

// Entropy of softmax(x), x [n], when each x[i] stands for a group with the log-sum-exp x[i] and entropy inner[i], or for a
// single id. With d = x - max: log of the sum of exp(d), plus the mean of inner - d.
inline float entropy_of(const float* x, const float* inner, int n, float max, float sum) {
    const float shift = max == -kInfinity ? 0.0f : max;
    float lane[kLanes] = {};
    for (int start = 0; start < n; start += kLanes)
        UNMASK_LANES for (int i = 0; i < kLanes; ++i) {
            const float d = x[start + i] - shift, held = d < -87.0f ? -87.0f : d;  // as exp_nonpositive holds it
            lane[i] += exp_nonpositive(d) * ((inner ? inner[start + i] : 0.0f) - held);
        }
    return log_positive(sum) + fold(lane, Sum{}) / sum;
}

// The two largest logits of a row and the lowest id of the first.
struct Best {
    float first = -kInfinity, second = -kInfinity;
    int64_t id = -1;

    void merge(const Best& other) {
        const bool ahead = other.first > first || (other.first == first && other.id < id);
        const float rest = ahead ? Larger{}(first, other.second) : Larger{}(other.first, second);
        if (ahead) *this = other;
        second = rest;
    }

    // The logits of a block, the largest of which is max. Blocks come in rising order.
    void see(int64_t block, const float* logits, float max) {
        Best here;
        if (max > second) {
            here.first = max;
            int winner = 0;
            while (logits[winner] != max) ++winner;
            here.id = block * kBlock + winner;
            for (int i = 0; i < kBlock; ++i)
                if (i != winner) here.second = Larger{}(logits[i], here.second);
        }
        merge(here);
    }
};

// The best block that a thread has seen of one row.
struct Record {
    float score;
    int64_t block;
    float logits[kBlock];
    Best best;
};

class Race {
   public:
    Race(const HeadCall& call, int64_t most_rows, int threads)
        : call_(call), law_(call.logits), blocks_(num_blocks(call.logits)),
          stride_(round_up(blocks_, kLanes)), row_bytes_(blocks_ * kBlock * sizeof(float)),
          chunk_(larger(1, smaller(smaller(most_rows, law_.chunk()), most_chunk(threads)))),
          threads_(static_cast<int>(smaller(threads, blocks_))), scratch_(bytes()) {
        law_.allocate(scratch_, threads_);
        gumbel_ = scratch_.take<float>(chunk_ * stride_);
        lse_ = scratch_.take<float>(chunk_ * stride_);
        if (call_.entropy) entropy_ = scratch_.take<float>(chunk_ * stride_);
        records_ = scratch_.take<Record>(threads_ * chunk_);
        tiles_ = scratch_.take<float>(threads_ * chunk_ * kBlock);
        if (!truncates()) return;
        logits_ = scratch_.take<float>(chunk_ * blocks_ * kBlock);
        for (int thread = 0; thread < threads_; ++thread) truncations_.emplace_back(blocks_, scratch_);
    }

    int64_t chunk() const { return chunk_; }

    // Rows [first, first + rows), rows <= chunk().
    void run(int64_t first, int64_t rows) {
        first_ = first;
        law_.start(first);
        const int few = static_cast<int>(smaller(threads_, (rows + 7) / 8));  // a row alone is soon done
        parallel_for(few, rows, [&](int64_t row, int) { prepare(row); });
        if (truncates()) {
            parallel_for(threads_, blocks_, [&](int64_t block, int thread) { keep(block, rows, thread); });
            parallel_for(threads_, rows, [&](int64_t row, int thread) { race_row(row, thread), finish(row); });
        } else {
            parallel_for(threads_, blocks_, [&](int64_t block, int thread) { race_block(block, rows, thread); });
            parallel_for(few, rows, [&](int64_t row, int) { finish(row); });
        }
    }

   private:
    const HeadCall& call_;
    Law law_;
    const int64_t blocks_, stride_, row_bytes_, chunk_;
    const int threads_;
    int64_t first_ = 0;
    Scratch scratch_;
    float *gumbel_ = nullptr, *lse_ = nullptr, *entropy_ = nullptr;  // [chunk, stride] by block
    Record* records_ = nullptr;                                      // [threads, chunk]
    float* tiles_ = nullptr;                                         // [threads, chunk, kBlock]
    float* logits_ = nullptr;                                        // [chunk, blocks, kBlock], to be truncated
    std::vector<Truncation> truncations_;                            // one per thread

    int64_t most_chunk(int threads) const {
        return truncates() ? kWorkspace * threads / call_.threads / row_bytes_ : kMaxChunk;
    }

    size_t bytes() const {
        const size_t table = Scratch::padded(chunk_ * stride_ * sizeof(float)), shared = threads_ * chunk_;
        const size_t truncation = chunk_ * row_bytes_ + threads_ * Truncation::bytes(blocks_);
        return law_.bytes(threads_) + 3 * table + Scratch::padded(shared * sizeof(Record)) +
               shared * kBlock * sizeof(float) + (truncates() ? truncation : 0);
    }

    bool truncates() const { return call_.top_k > 0 || call_.top_p < 1; }
    bool ranks() const { return call_.max_prob || call_.argmax || call_.margin; }
    bool greedy(int64_t row) const { return call_.logits.temperature[first_ + row] == 0.0f; }

    RowKey key(int64_t row) const {
        const int64_t* key = call_.keys + 3 * (first_ + row);
        return {static_cast<uint32_t>(key[1]), static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[2]),
                static_cast<uint32_t>(call_.seed), static_cast<uint32_t>(call_.seed >> 32)};
    }

    // The row's noise for every block, and no records yet.
    void prepare(int64_t row) {
        law_.prepare(row);
        if (!greedy(row)) block_gumbels(key(row), stride_, gumbel_ + row * stride_);
        for (int64_t at = row * stride_ + blocks_; at < (row + 1) * stride_; ++at) {
            lse_[at] = -kInfinity;
            if (entropy_) entropy_[at] = 0;
        }
        for (int thread = 0; thread < threads_; ++thread) {
            Record& record = records_[thread * chunk_ + row];
            record.score = -kInfinity;
            record.block = blocks_;
            record.best = Best();
        }
    }

    // The thread's tile, filled with the block's logits of all rows; -inf for what cannot be drawn.
    float* tile(int64_t block, int64_t rows, int thread) const {
        float* tile = tiles_ + thread * chunk_ * kBlock;
        law_.tile(block, rows, tile, thread);
        if (call_.allow)
            for (int64_t row = 0; row < rows; ++row) mask(tile + row * kBlock, row, block);
        return tile;
    }

    void mask(float* logits, int64_t row, int64_t block) const {
        const int64_t all = (call_.logits.head.vocab() + 31) / 32, first = block * (kBlock / 32);
        const int32_t* words = call_.allow + (first_ + row) * call_.allow_stride + first;
        for (int64_t word = 0; word < smaller(kBlock / 32, all - first); ++word, logits += 32)
            for (int i = 0; i < 32; ++i) logits[i] = words[word] >> i & 1 ? logits[i] : -kInfinity;
    }

    void keep(int64_t block, int64_t rows, int thread) {
        const float* from = tile(block, rows, thread);
        for (int64_t row = 0; row < rows; ++row)
            __builtin_memcpy(logits_ + (row * blocks_ + block) * kBlock, from + row * kBlock, kBlock * sizeof(float));
    }

    void race_block(int64_t block, int64_t rows, int thread) {
        race(tile(block, rows, thread), rows, thread, [&](int64_t i) { return Place{i, block}; });
    }

    void race_row(int64_t row, int thread) {
        float* logits = logits_ + row * blocks_ * kBlock;
        truncations_[thread](logits, call_.top_k, call_.top_p);
        for (int64_t first = 0; first < blocks_; first += kMaxChunk)
            race(logits + first * kBlock, smaller(kMaxChunk, blocks_ - first), thread,
                 [&](int64_t i) { return Place{row, first + i}; });
    }

    struct Place {
        int64_t row, block;
    };

    // Scores logits [count, kBlock], the i-th of which are those of place(i).
    template <class Where>
    void race(const float* logits, int64_t count, int thread, Where place) {
        float max[kMaxChunk], sum[kMaxChunk], lse[kMaxChunk];
        for (int64_t i = 0; i < count; ++i) max[i] = maximum(logits + i * kBlock, kBlock);
        for (int64_t i = 0; i < count; ++i) sum[i] = sum_exp(logits + i * kBlock, kBlock, max[i]);
        for (int64_t i = 0; i < count; ++i) lse[i] = logsumexp(max[i], sum[i]);
        for (int64_t i = 0; i < count; ++i, logits += kBlock) {
            const auto [row, block] = place(i);
            const int64_t at = row * stride_ + block;
            lse_[at] = lse[i];
            if (entropy_) entropy_[at] = entropy_of(logits, nullptr, kBlock, max[i], sum[i]);
            Record& record = records_[thread * chunk_ + row];
            if (ranks()) record.best.see(block, logits, max[i]);
            const float score = greedy(row) ? max[i] : lse[i] + gumbel_[at];
            if (score > record.score) {  // blocks come in rising order: the lowest of equals stays
                record.score = score;
                record.block = block;
                __builtin_memcpy(record.logits, logits, sizeof record.logits);
            }
        }
    }

    // The winning block among the threads' records, then the race of its tokens.
    void finish(int64_t row) {
        const Record* won = records_ + row;
        Best best = won->best;
        for (int thread = 1; thread < threads_; ++thread) {
            const Record* other = records_ + thread * chunk_ + row;
            if (other->score > won->score || (other->score == won->score && other->block < won->block)) won = other;
            best.merge(other->best);
        }
        const float* lses = lse_ + row * stride_;
        const int n = static_cast<int>(stride_);
        const float max = maximum(lses, n), sum = sum_exp(lses, n, max), lse = logsumexp(max, sum);
        const float bad = lse - lse;  // NaN if nothing can be drawn, else 0
        const bool drawable = bad == 0.0f;
        const int winner = drawable ? race_tokens(*won, row) : 0;
        const int64_t r = first_ + row;
        call_.tokens[r] = drawable ? won->block * kBlock + winner : -1;
        call_.logprob[r] = drawable ? won->logits[winner] - lse : bad;
        call_.lse[r] = lse;
        const float largest = probability(best.first, lse);
        if (call_.max_prob) call_.max_prob[r] = largest + bad;
        if (call_.argmax) call_.argmax[r] = drawable ? best.id : -1;
        if (call_.margin) call_.margin[r] = largest - probability(best.second, lse) + bad;
        if (call_.entropy) call_.entropy[r] = entropy_of(lses, entropy_ + row * stride_, n, max, sum) + bad;
    }

    static float probability(float logit, float lse) {
        return logit == -kInfinity ? 0.0f : exp_nonpositive(logit < lse ? logit - lse : 0.0f);
    }

    // The token of the winning block, counted from its first id; the lowest of equals.
    int race_tokens(const Record& block, int64_t row) const {
        float gumbels[4][kBlock / 4] = {};
        if (!greedy(row)) token_gumbels(key(row), block.block, gumbels);
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

// Given logits are dealt out by rows, which needs no thread to wait for another; a product by blocks, so that each weight
// is read once for many rows.
void UNMASK_KERNEL(sample_head)(const HeadCall& call) {
    const int64_t rows = call.logits.head.num_rows;
    const bool by_rows = !call.logits.head.weight.data && rows >= call.threads;
    const int64_t share = by_rows ? (rows + call.threads - 1) / call.threads : rows;
    std::vector<std::unique_ptr<Race>> races;
    for (int thread = 0; thread < (by_rows ? call.threads : 1); ++thread)
        races.emplace_back(new Race(call, share, by_rows ? 1 : call.threads));
    const int64_t chunk = races[0]->chunk();
    parallel_for(by_rows ? call.threads : 1, (rows + chunk - 1) / chunk, [&](int64_t unit, int thread) {
        races[thread]->run(unit * chunk, smaller(chunk, rows - unit * chunk));
    });
}

}  // namespace unmask
