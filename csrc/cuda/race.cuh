// The race over the noise blocks and their tokens, one block of a few rows at a time. Logits lie in shared memory; the
// threads of a row are a team, and reduce in the order of online.h whatever their number.
#pragma once

#include "../online.h"
#include "product.cuh"

namespace unmask::cuda {

constexpr int kSpan = 32;  // consecutive noise blocks that are merged together, before the spans are
constexpr int kMaxSpans = kMaxVocab / kNoiseBlock / kSpan;

// What is known of the logits of a noise block or a span, by row and block or span. `stride` is a multiple of kLanes;
// the lse of what lies past the end is -inf. Null where nobody asked.
struct Table {
    float *lse, *entropy;
    float *max, *second;  // the two largest logits, and the id of the first
    int32_t* argmax;
    int count, stride;
};

struct Workspace {
    uint64_t* winner;  // [rows, blocks.stride]: logit bits << 32 | token in the block, of blocks that took the lead
    Table blocks, spans;
};

struct State {
    uint64_t best[kMaxRows];  // order_of(score, block) of the leading block
    uint32_t scored[kMaxSpans];  // blocks of the span
    uint32_t merged;             // spans
};

// Rises with the score, falls with the block, is positive.
UNMASK_DEVICE uint64_t order_of(float score, int block) {
    const uint32_t bits = as_bits(score + 0.0f), sign = bits >> 31;  // one zero only
    const uint32_t rising = bits ^ (sign ? 0xffffffffu : 0x80000000u);
    return static_cast<uint64_t>(rising) << 32 | ~static_cast<uint32_t>(block);
}
UNMASK_DEVICE int block_of(uint64_t order) { return static_cast<int>(~static_cast<uint32_t>(order)); }

UNMASK_DEVICE RowKey key_of(const Row& row, uint64_t seed) {
    return {row.position, row.sequence, row.draw, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

// exp(x) by the hardware; relative, and 0 below 1e-38.
UNMASK_DEVICE float exp_of(float x) { return exp2_approximate(x * 1.44269504f); }

// exp(x) of an x that is at most 0 but for rounding.
UNMASK_DEVICE float probability(float x) { return exp_of(x < 0.0f ? x : 0.0f); }

// The two largest of some numbers and the lowest index of the largest.
struct Rank {
    float max, second;
    int index;
};
UNMASK_DEVICE Rank join(const Rank& a, const Rank& b) {
    const bool first = a.max > b.max || (a.max == b.max && a.index < b.index);
    const float other = first ? b.max : a.max, second = first ? a.second : b.second;
    return {first ? a.max : b.max, second > other ? second : other, first ? a.index : b.index};
}

struct Summary {
    float lse, entropy;
    Rank rank;
};

UNMASK_DEVICE void enter(const Table& table, int row, int column, const Summary& summary) {
    const int64_t place = static_cast<int64_t>(row) * table.stride + column;
    publish(table.lse + place, summary.lse);
    if (column == table.count - 1)
        for (int past = 1; past < table.stride - column; ++past) publish(table.lse + place + past, -kInfinity);
    if (table.entropy) publish(table.entropy + place, summary.entropy);
    if (!table.max) return;
    publish(table.max + place, summary.rank.max);
    publish(table.second + place, summary.rank.second);
    publish(table.argmax + place, summary.rank.index);
}

// kSize neighbouring threads. Thread i keeps the lanes i, i + kSize, … of the kLanes of online.h.
template <int kSize>
struct Team {
    static constexpr int kOwn = kLanes / kSize;

    UNMASK_DEVICE static int rank() { return thread_index() % kSize; }

    template <class Join>
    UNMASK_DEVICE static float fold_lanes(float (&lane)[kOwn], Join join) {
        float value = lane[0];
        if constexpr (kOwn > 1) value = fold<kOwn / 2>(lane, join);
#pragma unroll
        for (int step = kSize / 2; step > 0; step /= 2) value = join(shuffle_xor(value, step), value);
        return value;
    }

    // Which of the kLanes * kSteps numbers the k-th of this thread is.
    UNMASK_DEVICE static int index(int k) { return k / kOwn * kLanes + k % kOwn * kSize + rank(); }

    // join over value(k), this thread's numbers k in [0, count), count a multiple of kOwn; kUnroll steps at a time.
    template <int kUnroll, class Join, class Value>
    UNMASK_DEVICE static float reduce(int count, float start, Join join, Value value) {
        float lane[kOwn];
#pragma unroll
        for (int own = 0; own < kOwn; ++own) lane[own] = start;
#pragma unroll kUnroll
        for (int first = 0; first < count; first += kOwn)
#pragma unroll
            for (int own = 0; own < kOwn; ++own) lane[own] = join(value(first + own), lane[own]);
        return fold_lanes(lane, join);
    }

    UNMASK_DEVICE static Rank join_ranks(Rank rank) {
#pragma unroll
        for (int step = kSize / 2; step > 0; step /= 2)
            rank = join(rank, {shuffle_xor(rank.max, step), shuffle_xor(rank.second, step),
                               shuffle_xor(rank.index, step)});
        return rank;
    }
};

// Rows of a turn of the race in shared memory; kStride keeps teams out of each other's banks.
template <class S>
struct Tile {
    static constexpr int kTeam = S::kPart < 32 || S::kRows > 64 ? kLanes : 8;  // fewer would crowd the registers
    static constexpr int kStride = kNoiseBlock + kTeam;

    float logits[S::kPart * kStride];
    float offset[kNoiseBlock];           // -inf after the last id
    float noise[S::kBlocks * S::kRows];  // by block and row
    int leads[S::kPart];                 // this block beat every block its row has seen
};

// A row's share of the noise block that a thread holds in registers.
template <class S>
struct Share {
    using Members = Team<Tile<S>::kTeam>;
    static constexpr int kCount = kNoiseBlock / Tile<S>::kTeam, kSteps = kNoiseBlock / kLanes;
    float logits[kCount];

    template <class Join, class Value>
    UNMASK_DEVICE static float reduce(float start, Join join, Value value) {
        return Members::template reduce<kSteps>(kCount, start, join, value);
    }

    // Bias, forbidden ids and temperature come on top of the product.
    UNMASK_DEVICE Share(const HeadCall& call, const Tile<S>& tile, const float* product, float scale, int row,
                        int block) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            const int i = Members::index(k);
            logits[k] = tile.offset[i] == -kInfinity ? -kInfinity : (product[i] + tile.offset[i]) * scale;
        }
        if (call.allow) forbid(call, row, block);
    }

    UNMASK_DEVICE void forbid(const HeadCall& call, int row, int block) {
        const int32_t* allow = call.allow + smaller(row, call.rows - 1) * call.allow_stride;
        const int words = (call.vocab + 31) / 32, first = block * (kNoiseBlock / 32);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            const int i = Members::index(k), word = first + i / 32;
            const uint32_t allowed = word < words ? static_cast<uint32_t>(allow[word]) : 0u;
            if (!(allowed >> (i % 32) & 1)) logits[k] = -kInfinity;
        }
    }

    UNMASK_DEVICE float max() const {
        return reduce(-kInfinity, Larger{}, [&](int k) { return logits[k]; });
    }

    UNMASK_DEVICE float sum_exp(float shift) const {
        return reduce(0.0f, Sum{}, [&](int k) { return exp_of(logits[k] - shift); });
    }

    // Of the softmax over the block, given sum_exp(shift).
    UNMASK_DEVICE float entropy(float shift, float sum) const {
        const float weighted = reduce(0.0f, Sum{}, [&](int k) {
            const float x = logits[k] - shift;
            return x == -kInfinity ? 0.0f : exp_of(x) * x;
        });
        return sum > 0.0f ? log_positive(sum) - weighted / sum : 0.0f;
    }

    UNMASK_DEVICE Rank rank(int first) const {
        Rank rank{-kInfinity, -kInfinity, first};
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            const bool largest = logits[k] > rank.max;
            const float other = largest ? rank.max : logits[k];
            if (other > rank.second) rank.second = other;
            if (largest) rank.max = logits[k], rank.index = first + Members::index(k);
        }
        return Members::join_ranks(rank);
    }
};

// This thread's share of the block noise of all rows, for the blocks multiplied together.
template <class S>
UNMASK_DEVICE void draw_noise(const HeadCall& call, const Row* rows, Tile<S>& tile, int first_block) {
    static_assert(S::kBlocks * S::kRows <= kThreads, "a thread draws one number");
    const int row = thread_index() % S::kRows, block = first_block + thread_index() / S::kRows;
    if (thread_index() >= S::kBlocks * S::kRows || row >= call.rows) return;
    const Words words = philox(key_of(rows[row], call.seed), kBlockRace, block);
    tile.noise[thread_index()] = gumbel(words.w0, words.w1);
}

// Scores a block, the i-th of those multiplied together, for one row of the tile.
template <class S>
UNMASK_DEVICE void score_row(const HeadCall& call, const Workspace& work, State* state, const Row* rows, Tile<S>& tile,
                             int block, int i, int part, int member) {
    using Members = Team<Tile<S>::kTeam>;
    const int row = part * S::kPart + member;
    const uint64_t leader = read_published(state->best + row);  // early: a leader rarely falls
    float* product = tile.logits + member * Tile<S>::kStride;
    const Share<S> share(call, tile, product, rows[row].scale, row, block);
    const float max = share.max(), shift = max == -kInfinity ? 0.0f : max, sum = share.sum_exp(shift);
    Summary summary{logsumexp(max, sum), 0.0f, {}};
    if (work.blocks.entropy) summary.entropy = share.entropy(shift, sum);
    if (work.blocks.max) summary.rank = share.rank(block * kNoiseBlock);
    const float score = rows[row].random ? summary.lse + tile.noise[i * S::kRows + row] : max;
    const uint64_t order = order_of(score, block);
    const bool leads = score > -kInfinity && order > leader;
    if (leads) {  // the leader only rises: where rank 0 takes the lead below, no thread has seen a better one
#pragma unroll
        for (int k = 0; k < share.kCount; ++k) product[Members::index(k)] = share.logits[k];
    }
    if (Members::rank() != 0 || row >= call.rows) return;
    enter(work.blocks, row, block, summary);
    tile.leads[member] = leads && order > atomic_max(state->best + row, order);
}

template <class S>
UNMASK_DEVICE void score_block(const HeadCall& call, const Workspace& work, State* state, const Row* rows,
                               Tile<S>& tile, int block, int i, int part) {
    constexpr int kTeam = Tile<S>::kTeam, kAtOnce = kThreads / kTeam;
    const int num_rows = smaller(S::kPart, call.rows - part * S::kPart), of_warp = thread_index() / 32 * (32 / kTeam);
#pragma unroll 1
    for (int first = 0; first + of_warp < num_rows; first += kAtOnce)  // a warp's teams stay together
        score_row<S>(call, work, state, rows, tile, block, i, part, first + thread_index() / kTeam);
}

// A warp draws the token that the row takes if this block stays in the lead.
UNMASK_DEVICE void draw_token(const float* logits, const Row& row, uint64_t seed, uint64_t* winner, int block) {
    const int lane = thread_index() % 32;
    float gumbels[4] = {};
    if (row.random) {
        const Words words = philox(key_of(row, seed), kTokenRace, block * (kNoiseBlock / 4) + lane);
        gumbels[0] = gumbel(words.w0);
        gumbels[1] = gumbel(words.w1);
        gumbels[2] = gumbel(words.w2);
        gumbels[3] = gumbel(words.w3);
    }
    float best = -kInfinity;
    int token = 4 * lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float score = logits[4 * lane + i] + gumbels[i];
        if (score > best) best = score, token = 4 * lane + i;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float score = shuffle_xor(best, step);
        const int other = shuffle_xor(token, step);
        if (score > best || (score == best && other < token)) best = score, token = other;
    }
    if (lane == 0) publish(winner, static_cast<uint64_t>(as_bits(logits[token])) << 32 | token);
}

template <class S>
UNMASK_DEVICE void draw_tokens(const HeadCall& call, const Workspace& work, const Row* rows, const Tile<S>& tile,
                               int block, int part) {
    const int first = part * S::kPart, num_rows = smaller(S::kPart, call.rows - first);
    for (int i = thread_index() / 32; i < num_rows; i += kWarps)
        if (tile.leads[i])
            draw_token(tile.logits + i * Tile<S>::kStride, rows[first + i], call.seed,
                       work.winner + static_cast<int64_t>(first + i) * work.blocks.stride + block, block);
}

// One summary of `count` neighbours in a table, the first at `place`. `lses` is a copy of theirs, of n numbers, a
// multiple of kLanes. By a team of kLanes threads.
UNMASK_DEVICE Summary merge(const Table& table, int64_t place, const float* lses, int count, int n) {
    using Members = Team<kLanes>;
    const auto reduce = [&](float start, auto join, auto value) {
        return Members::reduce<4>(n / kLanes, start, join, [&](int k) { return value(Members::index(k)); });
    };
    const float max = reduce(-kInfinity, Larger{}, [&](int i) { return lses[i]; });
    const float shift = max == -kInfinity ? 0.0f : max;
    const float lse = logsumexp(max, reduce(0.0f, Sum{}, [&](int i) { return exp_of(lses[i] - shift); }));
    Summary summary{lse, 0.0f, {-kInfinity, -kInfinity, 0}};
    if (table.entropy)
        summary.entropy = reduce(0.0f, Sum{}, [&](int i) {
            const float x = lses[i] - lse, p = probability(x);
            return p > 0.0f ? p * (read_published(table.entropy + place + i) - x) : 0.0f;
        });
    if (!table.max) return summary;
    summary.rank.index = read_published(table.argmax + place);
    for (int i = Members::rank(); i < count; i += kLanes) {
        const int64_t at = place + i;
        summary.rank = join(summary.rank, {read_published(table.max + at), read_published(table.second + at),
                                           read_published(table.argmax + at)});
    }
    summary.rank = Members::join_ranks(summary.rank);
    return summary;
}

// Merges the columns [column, column + count) of a table, row by row, and gives each row's summary to use(row, summary)
// in one thread. `copy` is `size` bytes of shared memory.
template <class Use>
UNMASK_DEVICE void merge_rows(const Table& table, int rows, int column, int count, uint32_t copy, int size, Use use) {
    const int n = (count + kLanes - 1) / kLanes * kLanes, line = n * static_cast<int>(sizeof(float));
    const int pieces = line / 16, chunk = size / line;
    const float* copied = reinterpret_cast<const float*>(shared_memory() + copy);
    for (int first = 0; first < rows; first += chunk) {
        const int num_rows = smaller(chunk, rows - first);
        const int64_t start = static_cast<int64_t>(first) * table.stride + column;
        sync_threads();
        for (int i = thread_index(); i < num_rows * pieces; i += kThreads) {
            const float* line_start = table.lse + start + static_cast<int64_t>(i / pieces) * table.stride;
            copy_async(copy + 16 * i, line_start + i % pieces * 4, 16);
        }
        commit_copies();
        wait_copies<0>();
        sync_threads();
        for (int row = thread_index() / kLanes; row / 2 * 2 < num_rows; row += kThreads / kLanes) {
            const int own = smaller(row, num_rows - 1);  // a warp's two teams stay together
            const int64_t place = start + static_cast<int64_t>(own) * table.stride;
            const Summary summary = merge(table, place, copied + own * n, count, n);
            if (row < num_rows && thread_index() % kLanes == 0) use(first + row, summary);
        }
    }
}

// The outputs of a row, from the summary of all its logits.
UNMASK_DEVICE void write_row(const HeadCall& call, const Workspace& work, State* state, int row, const Summary& all) {
    const uint64_t best = read_published(state->best + row);
    state->best[row] = 0;
    const float lse = all.lse;
    const bool drawn = lse - lse == 0.0f && best != 0;
    const int block = drawn ? block_of(best) : 0;
    const uint64_t* winners = work.winner + static_cast<int64_t>(row) * work.blocks.stride;
    const uint64_t winner = drawn ? read_published(winners + block) : 0;
    const int64_t token = drawn ? static_cast<int64_t>(block) * kNoiseBlock + static_cast<uint32_t>(winner) : -1;
    const float bad = drawn ? 0.0f : lse - lse, top = probability(all.rank.max - lse);
    call.tokens[row] = token;
    call.lse[row] = lse;
    if (call.logprob) call.logprob[row] = as_float(static_cast<uint32_t>(winner >> 32)) - lse + bad;
    if (call.max_prob) call.max_prob[row] = top + bad;
    if (call.argmax) call.argmax[row] = all.rank.index;
    if (call.margin) call.margin[row] = top - probability(all.rank.second - lse) + bad;
    if (call.entropy) call.entropy[row] = all.entropy + bad;
    if (call.out && drawn) call.out[call.positions[row]] = token;
}

}  // namespace unmask::cuda
