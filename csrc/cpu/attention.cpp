// Attention on the CPU, both ways or by blocks. Compiled once per instruction set; UNMASK_ISA names the compilation.
//
// A unit of work is a chunk of queries of one head of one sequence. It walks over the keys a block at a time, packs the
// block (keys turned, values as they lie, both rotated and zero-padded to whole vectors), and keeps maximum, sum and
// weighted values of every query. A query meets the keys in the same order and in the same operations in every tile, so
// its result does not depend on its neighbours, on the batch or on threads. Keys that no query of a chunk sees are not
// packed, those that no query of a tile sees take part in no product, and of the others' shares unseen ones are 0.
#include "attention.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "../online.h"
#include "pack.h"
#include "parallel.h"

namespace unmask {
namespace {

constexpr int kKeys = 256, kQueries = 192;  // a block and a chunk: what they pack and keep fits the second cache
constexpr int kCols = 4 * kWidth;           // of a register tile, kRowTile rows high

// How columns lie in a packed item of 32 bits, and the step of a product over them.
struct Single {
    using Number = float;
    using Lanes = Vec;
    static constexpr int kColumns = 1;
    static Lanes spread(const Number* p) { return Vec{} + *p; }
    static Lanes load(const Number* p) { return load_as<Vec>(p); }
    static Vec step(Vec acc, Lanes a, Lanes b) { return a * b + acc; }
    static Number narrow(float x) { return x; }
    static void narrow(const float* from, Number* to) { std::copy(from, from + kLanes, to); }
    static void weave(const Number* row, const Number*, int64_t count, Number* to) { std::copy(row, row + count, to); }
};

#if defined(__AVX512BF16__)
struct Double {  // two bf16: products are exact, sums are fp32
    using Number = bf16;
    using Lanes = __m512bh;
    static constexpr int kColumns = 2;
    static Lanes spread(const Number* p) { return (__m512bh)_mm512_set1_epi32(load_as<int32_t>(p)); }
    static Lanes load(const Number* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec step(Vec acc, Lanes a, Lanes b) { return (Vec)_mm512_dpbf16_ps((__m512)acc, a, b); }
    static Number narrow(float x) { return to_bf16(x); }
    static void narrow(const float* from, Number* to) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load_as<Vec>(from));
        __builtin_memcpy(to, &rounded, sizeof rounded);
    }
    static void weave(const Number* row, const Number* next, int64_t count, Number* to) {
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t item = row[i].bits | static_cast<uint32_t>(next[i].bits) << 16;
            __builtin_memcpy(to + 2 * i, &item, sizeof item);
        }
    }
};
using Bf16Items = Double;
#else
using Bf16Items = Single;
#endif

template <class To, class From>
inline void copy_row(To* to, const From* from, int64_t n) {
    if constexpr (sizeof(To) == sizeof(From))
        __builtin_memcpy(to, from, n * sizeof(To));
    else
        for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

// One row [dim], rotated if the call asks for it.
template <class Items, class T>
inline void copy_rotated(const AttentionCall& call, const T* from, int64_t position, typename Items::Number* to) {
    const int64_t half = call.dim / 2;
    if (!call.cos) return copy_row(to, from, call.dim);
    const float *cos = call.cos + position * half, *sin = call.sin + position * half;
    for (int64_t i = 0; i < half; ++i) {
        const float first = widen(from[i]), second = widen(from[i + half]);
        to[i] = Items::narrow(first * cos[i] - second * sin[i]);
        to[i + half] = Items::narrow(second * cos[i] + first * sin[i]);
    }
}

template <class Items, class T>
class Attention {
   public:
    explicit Attention(const AttentionCall& call)
        : call_(call), items_(round_up(call.dim, Items::kColumns) / Items::kColumns),
          stride_(round_up(call.dim, kCols)) {
        int64_t token = 0, row = 0;
        for (int64_t s = 0; s < call.num_sequences; ++s) {
            for (int64_t first = 0; first < call.row_counts[s]; first += kQueries)
                chunks_.push_back({token, call.lengths[s], row, first, smaller(kQueries, call.row_counts[s] - first)});
            token += call.lengths[s];
            row += call.row_counts[s];
        }
    }

    void run() {
        const int64_t units = static_cast<int64_t>(chunks_.size()) * call_.num_heads;
        if (units == 0) return;
        const int threads = static_cast<int>(smaller(call_.threads, units));
        const size_t bytes = Scratch::padded(Local::bytes(items_, stride_));
        Scratch scratch(threads * bytes);
        char* memory = scratch.take<char>(threads * bytes);
        parallel_for(threads, units, [&](int64_t unit, int thread) {
            const Local local(memory + thread * bytes, items_, stride_);
            attend(chunks_[unit / call_.num_heads], unit % call_.num_heads, local);
        });
    }

   private:
    using Number = typename Items::Number;

    struct Chunk {
        int64_t token, num_keys, row, first, num_queries;  // row: of the sequence's first query
    };

    // A thread's memory.
    struct Local {
        Number *query, *key;            // [kQueries, items], [items, kKeys]
        Number *value, *turn;           // [kKeys / columns, stride], [kWidth, items]
        float *weighted, *top, *total;  // [kQueries, stride], [kQueries], [kQueries]
        int64_t* end;                   // [kQueries]: the first key that a query does not see

        static size_t numbers(int64_t items, int64_t stride) {
            const size_t turn = kWidth * round_up(items, kWidth);
            return (kQueries * items + items * kKeys + turn) * Items::kColumns + kKeys * stride;
        }
        static size_t bytes(int64_t items, int64_t stride) {
            return numbers(items, stride) * sizeof(Number) + (kQueries * stride + 2 * kQueries) * sizeof(float) +
                   kQueries * sizeof(int64_t) + 64;
        }
        Local(char* memory, int64_t items, int64_t stride) {
            weighted = reinterpret_cast<float*>(memory);
            top = weighted + kQueries * stride;
            total = top + kQueries;
            end = reinterpret_cast<int64_t*>(total + kQueries);
            key = reinterpret_cast<Number*>(end + kQueries);
            value = key + items * kKeys * Items::kColumns;
            query = value + kKeys * stride;
            turn = query + kQueries * items * Items::kColumns;
        }
    };

    const AttentionCall& call_;
    const int64_t items_, stride_;
    std::vector<Chunk> chunks_;

    static const T* at(const Heads& x, int64_t token, int64_t head) {
        return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
    }

    void attend(const Chunk& chunk, int64_t head, const Local& local) const {
        const int64_t group = head / (call_.num_heads / call_.num_groups);
        int64_t num_keys = 0;
        for (int64_t i = 0; i < chunk.num_queries; ++i) {
            const int64_t row = chunk.row + chunk.first + i;
            const int64_t position = call_.positions ? call_.positions[row] : chunk.first + i;
            Number* to = local.query + i * items_ * Items::kColumns;
            copy_rotated<Items>(call_, at(call_.query, row, head), position, to);
            local.top[i] = -kInfinity;
            local.total[i] = 0;
            const int64_t end = call_.block ? (position / call_.block + 1) * call_.block : chunk.num_keys;
            local.end[i] = smaller(end, chunk.num_keys);
            num_keys = larger(num_keys, local.end[i]);
        }
        std::fill(local.weighted, local.weighted + chunk.num_queries * stride_, 0.0f);
        for (int64_t first = 0; first < num_keys; first += kKeys) {
            const int64_t count = smaller(kKeys, num_keys - first);
            pack_keys(chunk.token + first, first, count, group, local);
            pack_values(chunk.token + first, count, group, local);
            for (int64_t row = 0; row < chunk.num_queries; row += kRowTile)
                meet(local, row, smaller(kRowTile, chunk.num_queries - row), first);
        }
        for (int64_t i = 0; i < chunk.num_queries; ++i) finish(chunk.row + chunk.first + i, head, local, i);
    }

    // Keys as columns: item i of key k at [i][k], in 32 bits.
    void pack_keys(int64_t token, int64_t position, int64_t count, int64_t group, const Local& local) const {
        const int64_t width = round_up(items_, kWidth);
        for (int64_t key = 0; key < round_up(count, kCols); key += kWidth) {
            for (int64_t i = 0; i < kWidth; ++i) {
                Number* to = local.turn + i * width * Items::kColumns;
                if (key + i < count)
                    copy_rotated<Items>(call_, at(call_.key, token + key + i, group), position + key + i, to);
                else
                    std::fill(to, to + items_ * Items::kColumns, Number{});
            }
            for (int64_t item = 0; item < items_; item += kWidth)
                transpose(reinterpret_cast<const float*>(local.turn) + item, width,
                          reinterpret_cast<float*>(local.key) + item * kKeys + key, kKeys,
                          smaller(kWidth, items_ - item));
        }
    }

    // Values of kColumns consecutive keys in one item: key k, column c at [k / columns][c][k % columns].
    void pack_values(int64_t token, int64_t count, int64_t group, const Local& local) const {
        for (int64_t key = 0; key < count; key += Items::kColumns) {
            for (int64_t i = 0; i < Items::kColumns; ++i) {
                Number* row = local.turn + i * stride_;
                std::fill(row, row + stride_, Number{});
                if (key + i < count) copy_row(row, at(call_.value, token + key + i, group), call_.dim);
            }
            Items::weave(local.turn, local.turn + stride_, stride_, local.value + key * stride_);
        }
    }

    // One tile of queries meets one block of keys, from `first` on.
    void meet(const Local& local, int64_t row, int64_t rows, int64_t first) const {
        int64_t seen[kRowTile], count = 0;  // keys of the block
        for (int64_t r = 0; r < rows; ++r) {
            seen[r] = smaller(kKeys, larger(0, local.end[row + r] - first));
            count = larger(count, seen[r]);
        }
        if (count == 0) return;
        alignas(64) float scores[kRowTile][kKeys];
        alignas(64) Number shares[kRowTile][kKeys];
        const Number* query[kRowTile];
        for (int64_t r = 0; r < kRowTile; ++r)
            query[r] = local.query + (row + smaller(r, rows - 1)) * items_ * Items::kColumns;
        const int64_t wide = round_up(count, kCols);
        for (int64_t key = 0; key < wide; key += kCols) {
            Vec acc[kRowTile][4] = {};
            product(acc, query, local.key + key * Items::kColumns, kKeys * Items::kColumns, items_);
            for (int r = 0; r < kRowTile; ++r)
                for (int j = 0; j < 4; ++j) store(scores[r] + key + j * kWidth, acc[r][j] * call_.scale);
        }
        float shrink[kRowTile];
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t key = seen[r]; key < wide; ++key) scores[r][key] = -kInfinity;
            const float before = local.top[row + r], top = Larger{}(maximum(scores[r], static_cast<int>(wide)), before);
            local.top[row + r] = top;
            const float base = top == -kInfinity ? 0.0f : top;  // -inf - -inf is NaN
            shrink[r] = exp_nonpositive(before - base);
            local.total[row + r] = local.total[row + r] * shrink[r] + share(scores[r], base, seen[r], wide, shares[r]);
        }
        const Number* weights[kRowTile];
        for (int64_t r = 0; r < kRowTile; ++r) weights[r] = shares[smaller(r, rows - 1)];
        for (int64_t col = 0; col < stride_; col += kCols) {
            Vec acc[kRowTile][4];
            float* to = local.weighted + row * stride_ + col;
            for (int64_t r = 0; r < kRowTile; ++r)
                for (int j = 0; j < 4; ++j)
                    acc[r][j] = r < rows ? load(to + r * stride_ + j * kWidth) * shrink[r] : Vec{};
            product(acc, weights, local.value + col * Items::kColumns, stride_ * Items::kColumns,
                    round_up(count, Items::kColumns) / Items::kColumns);
            for (int64_t r = 0; r < rows; ++r)
                for (int j = 0; j < 4; ++j) store(to + r * stride_ + j * kWidth, acc[r][j]);
        }
    }

    // acc[r] += sum over items i of rows[r][i] * columns[i], kCols columns wide.
    static void product(Vec (&acc)[kRowTile][4], const Number* const (&rows)[kRowTile], const Number* columns,
                        int64_t stride, int64_t num_items) {
        for (int64_t item = 0; item < num_items; ++item, columns += stride) {
            typename Items::Lanes lanes[4];
            for (int j = 0; j < 4; ++j) lanes[j] = Items::load(columns + j * kWidth * Items::kColumns);
            for (int r = 0; r < kRowTile; ++r) {
                const auto row = Items::spread(rows[r] + item * Items::kColumns);
                for (int j = 0; j < 4; ++j) acc[r][j] = Items::step(acc[r][j], row, lanes[j]);
            }
        }
    }

    // exp(score - top) of the keys that are seen and 0 of the others, rounded to the packed type; returns their sum
    // before rounding.
    static float share(float* scores, float top, int64_t seen, int64_t count, Number* out) {
        float lane[kLanes] = {};
        for (int64_t start = 0; start < seen; start += kLanes) {
            UNMASK_LANES for (int i = 0; i < kLanes; ++i) {
                const float weight = start + i < seen ? exp_nonpositive(scores[start + i] - top) : 0;
                lane[i] += weight;
                scores[start + i] = weight;
            }
            Items::narrow(scores + start, out + start);
        }
        for (int64_t start = round_up(seen, kLanes); start < count; ++start) out[start] = Number{};
        return fold(lane, Sum{});
    }

    void finish(int64_t row, int64_t head, const Local& local, int64_t i) const {
        T* to = const_cast<T*>(at(call_.out, row, head));
        const float* from = local.weighted + i * stride_;
        const float scale = 1 / local.total[i];
        for (int64_t col = 0; col < call_.dim; ++col) to[col] = narrow_to<T>(from[col] * scale);
    }
};

}  // namespace

void UNMASK_KERNEL(attention)(const AttentionCall& call) {
    if (call.type == Type::f32) return Attention<Single, float>(call).run();
    return Attention<Bf16Items, bf16>(call).run();
}

}  // namespace unmask
