// The race over the noise blocks and their tokens, one block of a few rows at a time. Logits lie in shared memory; the
// threads of a row are a team, and reduce in the order of online.h whatever their number.
#pragma once

#include "../online.h"
#include "product.cuh"

namespace unmask::cuda {

// What the CTAs leave for the one that finishes: a table [rows, stride] each, by row and noise block.
struct Workspace {
    uint64_t* winner;  // logit bits << 32 | token of the block, where it led its row's race when it was scored
    float* lse;
    float *max, *second;  // the two largest logits, and the id of the first, counted from the block's first
    int32_t* argmax;
    float* entropy;
    int blocks, stride;
};

struct State {
    uint64_t best[kMaxRows];  // order_of(score, block) of the leading block
    uint32_t finished;        // CTAs
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

// exp(x), 0 below the range in which exp_nonpositive is relative; x is at most 0 but for rounding.
UNMASK_DEVICE float probability(float x) { return x > -87.0f ? exp_nonpositive(x < 0.0f ? x : 0.0f) : 0.0f; }

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

    // join over value(i), i in [0, n), n a multiple of kLanes.
    template <class Join, class Value>
    UNMASK_DEVICE static float reduce(int n, float start, Join join, Value value) {
        float lane[kOwn];
#pragma unroll
        for (int own = 0; own < kOwn; ++own) lane[own] = start;
#pragma unroll kSize / 2
        for (int first = 0; first < n; first += kLanes)
#pragma unroll
            for (int own = 0; own < kOwn; ++own) lane[own] = join(value(first + own * kSize + rank()), lane[own]);
        return fold_lanes(lane, join);
    }

    UNMASK_DEVICE static float max_of(const float* x, int n) {
        return reduce(n, -kInfinity, Larger{}, [&](int i) { return x[i]; });
    }

    UNMASK_DEVICE static float sum_exp_of(const float* x, int n, float max) {
        const float shift = max == -kInfinity ? 0.0f : max;
        return reduce(n, 0.0f, Sum{}, [&](int i) { return exp_nonpositive(x[i] - shift); });
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
    static constexpr int kTeam = kThreads / S::kPart < kLanes ? kThreads / S::kPart : kLanes;
    static constexpr int kStride = kNoiseBlock + kTeam;

    float logits[S::kPart * kStride];
    float offset[kNoiseBlock];  // -inf after the last id
    int leads[S::kPart];        // this block beat every block its row has seen
};

// Bias, forbidden ids and temperature, in place.
template <class S>
UNMASK_DEVICE void temper(const HeadCall& call, Tile<S>& tile, float* logits, float temperature, int row, int block) {
    using Members = Team<Tile<S>::kTeam>;
    const int words = (call.vocab + 31) / 32, first_word = block * (kNoiseBlock / 32);
    const int32_t* allow = call.allow ? call.allow + smaller(row, call.rows - 1) * call.allow_stride : nullptr;
    const bool divide = temperature != 0.0f && temperature != 1.0f;
#pragma unroll Tile<S>::kTeam / 2
    for (int first = 0; first < kNoiseBlock; first += kLanes) {
        const int word = first_word + first / 32;
        const uint32_t allowed = !allow ? ~0u : word < words ? static_cast<uint32_t>(allow[word]) : 0u;
#pragma unroll
        for (int own = 0; own < Members::kOwn; ++own) {
            const int i = first + own * Tile<S>::kTeam + Members::rank();
            const float offset = allowed >> (i % 32) & 1 ? tile.offset[i] : -kInfinity;
            float logit = offset == -kInfinity ? offset : logits[i] + offset;
            if (divide) logit /= temperature;
            logits[i] = logit;
        }
    }
}

// Sum of p log p of the block's softmax, times -1.
template <class Members>
UNMASK_DEVICE float block_entropy(const float* logits, float max, float sum) {
    const float shift = max == -kInfinity ? 0.0f : max;
    const float weighted = Members::reduce(kNoiseBlock, 0.0f, Sum{}, [&](int i) {
        const float x = logits[i] - shift;
        return x == -kInfinity ? 0.0f : exp_nonpositive(x) * x;
    });
    return max == -kInfinity ? 0.0f : log_positive(sum) - weighted / sum;
}

template <class Members>
UNMASK_DEVICE Rank block_rank(const float* logits) {
    Rank rank{-kInfinity, -kInfinity, 0};
    for (int i = Members::rank(); i < kNoiseBlock; i += kLanes / Members::kOwn) {
        const float x = logits[i];
        if (x > rank.max)
            rank = {x, rank.max, i};
        else if (x > rank.second)
            rank.second = x;
    }
    return Members::join_ranks(rank);
}

// Tempers the tile's logits and scores the block for each of its rows.
template <class S>
UNMASK_DEVICE void score_block(const HeadCall& call, const Workspace& work, State* state, const Row* rows,
                               Tile<S>& tile, int block, int part) {
    constexpr int kTeam = Tile<S>::kTeam;
    using Members = Team<kTeam>;
    const int member = thread_index() / kTeam, row = part * S::kPart + member;
    const int first_of_warp = thread_index() / 32 * (32 / kTeam);
    if (first_of_warp >= S::kPart || part * S::kPart + first_of_warp >= call.rows) return;
    float* logits = tile.logits + member * Tile<S>::kStride;
    const float temperature = rows[row].temperature;
    temper<S>(call, tile, logits, temperature, row, block);
    const float max = Members::max_of(logits, kNoiseBlock);
    const float sum = Members::sum_exp_of(logits, kNoiseBlock, max), lse = logsumexp(max, sum);
    const int64_t place = static_cast<int64_t>(row) * work.stride + block;
    const bool writes = Members::rank() == 0 && row < call.rows;
    if (work.entropy) {
        const float entropy = block_entropy<Members>(logits, max, sum);
        if (writes) publish(work.entropy + place, entropy);
    }
    if (work.max) {
        const Rank rank = block_rank<Members>(logits);
        if (writes) {
            publish(work.max + place, rank.max);
            publish(work.second + place, rank.second);
            publish(work.argmax + place, rank.index);
        }
    }
    if (!writes) return;
    publish(work.lse + place, lse);
    if (block == work.blocks - 1)
        for (int past = 1; past < work.stride - block; ++past) publish(work.lse + place + past, -kInfinity);
    float score = max;
    if (temperature != 0.0f) {
        const Words words = philox(key_of(rows[row], call.seed), kBlockRace, block);
        score = lse + gumbel(words.w0, words.w1);
    }
    const uint64_t order = order_of(score, block);
    tile.leads[member] = score > -kInfinity && order > atomic_max(state->best + row, order);
}

// A warp draws the token that the row takes if this block stays in the lead.
UNMASK_DEVICE void draw_token(const float* logits, const Row& row, uint64_t seed, uint64_t* winner, int block) {
    const int lane = thread_index() % 32;
    float gumbels[4] = {};
    if (row.temperature != 0.0f) {
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
                       work.winner + static_cast<int64_t>(first + i) * work.stride + block, block);
}

// The row's outputs from its tables; `lses` is a copy of its line of work.lse. A team of kLanes threads, which writes
// only if it is asked to.
UNMASK_DEVICE void finish_row(const HeadCall& call, const Workspace& work, State* state, const float* lses, int row,
                              bool writes) {
    using Members = Team<kLanes>;
    const int64_t line = static_cast<int64_t>(row) * work.stride;
    const float max = Members::max_of(lses, work.stride);
    const float lse = logsumexp(max, Members::sum_exp_of(lses, work.stride, max));
    float entropy = 0.0f;
    if (work.entropy)
        entropy = Members::reduce(work.stride, 0.0f, Sum{}, [&](int block) {
            const float x = lses[block] - lse;
            return x > -87.0f ? probability(x) * (read_published(work.entropy + line + block) - x) : 0.0f;
        });
    Rank rank{-kInfinity, -kInfinity, 0};
    if (work.max) {
        for (int block = Members::rank(); block < work.blocks; block += kLanes)
            rank = join(rank, {read_published(work.max + line + block), read_published(work.second + line + block),
                               block * kNoiseBlock + read_published(work.argmax + line + block)});
        rank = Members::join_ranks(rank);
    }
    if (!writes || Members::rank() != 0) return;
    const uint64_t best = read_published(state->best + row);
    state->best[row] = 0;
    const bool drawn = lse - lse == 0.0f && best != 0;
    const int block = drawn ? block_of(best) : 0;
    const uint64_t winner = drawn ? read_published(work.winner + line + block) : 0;
    const int64_t token = drawn ? static_cast<int64_t>(block) * kNoiseBlock + static_cast<uint32_t>(winner) : -1;
    const float bad = drawn ? 0.0f : lse - lse, top = probability(rank.max - lse);
    call.tokens[row] = token;
    call.lse[row] = lse;
    if (call.logprob) call.logprob[row] = as_float(static_cast<uint32_t>(winner >> 32)) - lse + bad;
    if (call.max_prob) call.max_prob[row] = top + bad;
    if (call.argmax) call.argmax[row] = rank.index;
    if (call.margin) call.margin[row] = top - probability(rank.second - lse) + bad;
    if (call.entropy) call.entropy[row] = entropy + bad;
    if (call.out && drawn) call.out[call.positions[row]] = token;
}

}  // namespace unmask::cuda
