// sample_head on the CPU. Compiled once per instruction set; UNMASK_ISA names the compilation.
//
// A unit of work is a span of noise blocks for a chunk of rows: their logits go into a tile, each block's log-sum-exp
// into a table, and the best block so far of each row, logits included, into the thread's records. When all blocks are
// done the records of the threads are compared and the tokens of the winning block race. A logit is one accumulator of
// kWidth lanes, summed over the columns in order and folded by a fixed tree, whatever rows and threads surround it.
#include "sample_head.h"

#include "../noise.h"
#include "../online.h"
#include "parallel.h"
#include "simd.h"

namespace unmask {
namespace {

constexpr int kBlock = kNoiseBlock;

template <class T>
inline const T* at(const Matrix& m, int64_t row, int64_t col = 0) {
    return static_cast<const T*>(m.data) + row * m.row_stride + col * m.col_stride;
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From>
inline void copy_row(To* to, const From* from, int64_t n, int64_t stride) {
    if (stride == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i * stride]);
}
inline void copy_row(bf16* to, const bf16* from, int64_t n, int64_t stride) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
}

// Where logits come from when hidden holds them.
template <class T>
struct GivenLogits {
    static constexpr int kSpan = 8, kChunk = 16;  // noise blocks per unit, rows per chunk: whole pages, small tables

    const Matrix& hidden;
    int64_t first = 0;

    GivenLogits(const HeadCall& call, int64_t) : hidden(call.hidden) {}
    size_t bytes() const { return 0; }
    void allocate(Scratch&) {}
    void prepare(int64_t) {}

    void logits(int64_t id, int64_t count, int64_t rows, float* tile) const {
        for (int64_t row = 0; row < rows; ++row)
            copy_row(tile + row * kBlock, at<T>(hidden, first + row, id), count, hidden.col_stride);
    }
};

// A skinny product: kRowTile rows of hidden against four rows of weight at a time. Every logit is the same sequence of
// operations in every tile.
template <class Dot>
struct Product {
    static constexpr int kSpan = 1, kChunk = 128;
    using Hidden = typename Dot::Hidden;
    using Weight = typename Dot::Weight;

    const HeadCall& call;
    int64_t chunk, cols, stride, first = 0;
    Hidden* packed = nullptr;  // [chunk, stride], zeros after the last column

    Product(const HeadCall& call, int64_t chunk)
        : call(call), chunk(chunk), cols(call.hidden.cols), stride(round_up(cols, Dot::kStep)) {}

    size_t bytes() const { return Scratch::padded(chunk * stride * sizeof(Hidden)); }
    void allocate(Scratch& scratch) { packed = scratch.take<Hidden>(chunk * stride); }

    void prepare(int64_t row) {
        Hidden* to = packed + row * stride;
        const Matrix& from = call.hidden;
        if (from.type == Type::bf16)
            copy_row(to, at<bf16>(from, first + row), cols, from.col_stride);
        else if constexpr (sizeof(Hidden) == 4)
            copy_row(to, at<float>(from, first + row), cols, from.col_stride);
        for (int64_t col = cols; col < stride; ++col) to[col] = Hidden{};
    }

    template <int kRows>
    void tile(const Hidden* h, const Weight* const (&w)[4], float* out) const {
        Vec acc[kRows][4] = {};
        auto advance = [&](int64_t col, const Weight* const (&from)[4]) {
            typename Dot::Lanes lanes[kRows];
            for (int r = 0; r < kRows; ++r) lanes[r] = Dot::lanes(h + r * stride + col);
            for (int j = 0; j < 4; ++j)
                for (int r = 0; r < kRows; ++r) acc[r][j] = Dot::step(acc[r][j], lanes[r], from[j]);
        };
        int64_t col = 0;
        for (; col + Dot::kStep <= cols; col += Dot::kStep) {
            const Weight* const from[4] = {w[0] + col, w[1] + col, w[2] + col, w[3] + col};
            advance(col, from);
        }
        if (col < cols) {
            Weight rest[4][Dot::kStep] = {};
            for (int j = 0; j < 4; ++j) __builtin_memcpy(rest[j], w[j] + col, (cols - col) * sizeof(Weight));
            const Weight* const from[4] = {rest[0], rest[1], rest[2], rest[3]};
            advance(col, from);
        }
        for (int r = 0; r < kRows; ++r) {
            const Four sum = sums(acc[r]);
            __builtin_memcpy(out + r * kBlock, &sum, sizeof sum);
        }
    }

    template <int kRows>
    void rest(int64_t rows, const Hidden* h, const Weight* const (&w)[4], float* out) const {
        if constexpr (kRows > 0) {
            if (rows == kRows) return tile<kRows>(h, w, out);
            rest<kRows - 1>(rows, h, w, out);
        }
    }

    // Logits of ids [id, id + count) into tile [rows, kBlock]; up to three more columns receive the last id's.
    void logits(int64_t id, int64_t count, int64_t rows, float* out) const {
        for (int64_t row = 0; row < rows; row += kRowTile)
            for (int64_t j = 0; j < count; j += 4) {
                const Weight* w[4];
                for (int64_t i = 0; i < 4; ++i) w[i] = at<Weight>(call.weight, id + smaller(j + i, count - 1));
                const Hidden* h = packed + row * stride;
                if (row + kRowTile <= rows)
                    tile<kRowTile>(h, w, out + row * kBlock + j);
                else
                    rest<kRowTile - 1>(rows - row, h, w, out + row * kBlock + j);
            }
    }
};

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

template <class Logits>
class Race {
   public:
    explicit Race(const HeadCall& call)
        : call_(call), chunk_(smaller(Logits::kChunk, call.rows())), blocks_((call.vocab() + kBlock - 1) / kBlock),
          stride_(round_up(blocks_, kLanes)), logits_(call, chunk_) {}

    void run() {
        const int64_t units = (blocks_ + Logits::kSpan - 1) / Logits::kSpan;
        threads_ = static_cast<int>(smaller(call_.threads, units));
        const size_t table = chunk_ * stride_, shared = threads_ * chunk_;
        Scratch scratch(logits_.bytes() + 2 * Scratch::padded(table * sizeof(float)) +
                        Scratch::padded(shared * sizeof(Record)) + shared * kBlock * sizeof(float));
        logits_.allocate(scratch);
        gumbel_ = scratch.take<float>(table);
        lse_ = scratch.take<float>(table);
        records_ = scratch.take<Record>(shared);
        tiles_ = scratch.take<float>(shared * kBlock);
        for (first_ = 0; first_ < call_.rows(); first_ += chunk_) {
            const int64_t rows = smaller(chunk_, call_.rows() - first_);
            logits_.first = first_;
            const int few = static_cast<int>(smaller(threads_, (rows + 7) / 8));  // a row alone is soon done
            parallel_for(few, rows, [&](int64_t row, int) { prepare(row); });
            parallel_for(threads_, units, [&](int64_t unit, int thread) {
                const int64_t end = smaller((unit + 1) * Logits::kSpan, blocks_);
                for (int64_t block = unit * Logits::kSpan; block < end; ++block) race(block, rows, thread);
            });
            parallel_for(few, rows, [&](int64_t row, int) { finish(row); });
        }
    }

   private:
    const HeadCall& call_;
    const int64_t chunk_, blocks_, stride_;
    Logits logits_;
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
        logits_.prepare(row);
        if (!greedy()) block_gumbels(key(row), stride_, gumbel_ + row * stride_);
        for (int64_t block = blocks_; block < stride_; ++block) lse_[row * stride_ + block] = -kInfinity;
        for (int thread = 0; thread < threads_; ++thread) {
            records_[thread * chunk_ + row].score = -kInfinity;
            records_[thread * chunk_ + row].block = blocks_;
        }
    }

    void race(int64_t block, int64_t rows, int thread) {
        const int64_t id = block * kBlock, count = smaller(kBlock, call_.vocab() - id);
        float* tile = tiles_ + thread * chunk_ * kBlock;
        logits_.logits(id, count, rows, tile);
        float max[Logits::kChunk], sum[Logits::kChunk], lse[Logits::kChunk];
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

template <class Logits>
void run(const HeadCall& call) {
    Race<Logits>(call).run();
}

}  // namespace

#define UNMASK_JOIN(a, b) a##b
#define UNMASK_NAME(isa) UNMASK_JOIN(sample_head_, isa)

void UNMASK_NAME(UNMASK_ISA)(const HeadCall& call) {
    const bool narrow = call.hidden.type == Type::bf16;
    if (!call.weight.data) return narrow ? run<GivenLogits<bf16>>(call) : run<GivenLogits<float>>(call);
    if (call.weight.type == Type::f32) return run<Product<Widened<float>>>(call);
    return narrow ? run<Product<Bf16Dot>>(call) : run<Product<Widened<bf16>>>(call);
}

}  // namespace unmask
