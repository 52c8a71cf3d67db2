// expected_embedding on the CPU. Compiled once per instruction set; UNMASK_ISA names the compilation.
//
// The vocabulary is cut into spans of noise blocks. A unit of work is a span for a chunk of rows: block by block the
// logits go into a tile and become weights exp(logit - largest so far), and a register-blocked product adds
// weights [rows, kBlock] x table [kBlock, E] to the sums of the span. Spans are taken in waves as large as the memory
// budget allows and added up in rising order, so that a row's bits depend on neither threads nor waves nor other rows.
#include "expected_embedding.h"

#include "../online.h"
#include "law.h"

namespace unmask {
namespace {

constexpr int64_t kSpan = 8;            // noise blocks
constexpr int64_t kBudget = 8 << 20;    // bytes for the sums of a wave
constexpr int64_t kStrip = 4 * kWidth;  // columns of the table in one register-blocked product

class Expectation {
   public:
    explicit Expectation(const EmbeddingCall& call)
        : call_(call), law_(call.logits), width_(call.table.cols), stride_(round_up(width_, kStrip)),
          blocks_(num_blocks(call.logits)), spans_((blocks_ + kSpan - 1) / kSpan) {
        const int64_t row_bytes = stride_ * sizeof(float);
        threads_ = static_cast<int>(smaller(call.threads, spans_));
        chunk_ = larger(1, smaller(law_.chunk(), kBudget / (threads_ * row_bytes)));
        wave_ = larger(threads_, smaller(spans_, kBudget / (chunk_ * row_bytes)));
    }

    void run() {
        const int64_t numbers = (wave_ + 1) * chunk_, vectors = wave_ * chunk_ * stride_;
        const int64_t tiles = threads_ * chunk_ * kBlock, strips = threads_ * kBlock * kStrip;
        Scratch scratch(law_.bytes(threads_) + 2 * Scratch::padded(numbers * sizeof(float)) +
                        (vectors + tiles + strips) * sizeof(float));
        law_.allocate(scratch, threads_);
        max_ = scratch.take<float>(numbers);
        mass_ = scratch.take<float>(numbers);
        tiles_ = scratch.take<float>(tiles);
        strips_ = scratch.take<float>(strips);
        vectors_ = scratch.take<float>(vectors);
        for (first_ = 0; first_ < call_.logits.head.num_rows; first_ += chunk_) {
            rows_ = smaller(chunk_, call_.logits.head.num_rows - first_);
            law_.start(first_);
            const int few = static_cast<int>(smaller(threads_, (rows_ + 7) / 8));  // a row alone is soon done
            parallel_for(few, rows_, [&](int64_t row, int) { prepare(row); });
            for (int64_t span = 0; span < spans_; span += wave_) {
                const int64_t count = smaller(wave_, spans_ - span);
                parallel_for(threads_, count, [&](int64_t slot, int thread) { sum(span + slot, slot, thread); });
                parallel_for(few, rows_, [&](int64_t row, int) { merge(row, count); });
            }
            parallel_for(few, rows_, [&](int64_t row, int) { finish(row); });
        }
    }

   private:
    const EmbeddingCall& call_;
    Law law_;
    const int64_t width_, stride_, blocks_, spans_;
    int threads_;
    int64_t chunk_, wave_, first_ = 0, rows_ = 0;
    float *max_ = nullptr, *mass_ = nullptr;      // [wave + 1, chunk]: of the spans of the wave, and of all before it
    float* vectors_ = nullptr;                    // [wave, chunk, stride]; all before it are in call_.embedding
    float *tiles_ = nullptr, *strips_ = nullptr;  // [threads, chunk, kBlock], [threads, kBlock, kStrip]

    float* embedding(int64_t row) const { return call_.embedding + (first_ + row) * width_; }

    void prepare(int64_t row) {
        law_.prepare(row);
        max_[wave_ * chunk_ + row] = -kInfinity;
        mass_[wave_ * chunk_ + row] = 0.0f;
        for (int64_t col = 0; col < width_; ++col) embedding(row)[col] = 0.0f;
    }

    // The sums of one span into a slot of the wave.
    void sum(int64_t span, int64_t slot, int thread) {
        float *max = max_ + slot * chunk_, *mass = mass_ + slot * chunk_, *vectors = vectors_ + slot * chunk_ * stride_;
        float* tile = tiles_ + thread * chunk_ * kBlock;
        for (int64_t row = 0; row < rows_; ++row) max[row] = -kInfinity, mass[row] = 0.0f;
        for (int64_t i = 0; i < rows_ * stride_; ++i) vectors[i] = 0.0f;
        const int64_t end = smaller((span + 1) * kSpan, blocks_);
        for (int64_t block = span * kSpan; block < end; ++block) {
            law_.tile(block, rows_, tile, thread);
            for (int64_t row = 0; row < rows_; ++row)
                weigh(tile + row * kBlock, max[row], mass[row], vectors + row * stride_);
            for (int64_t col = 0; col < width_; col += kStrip)
                multiply(block, col, tile, strips_ + thread * kBlock * kStrip, vectors + col);
        }
    }

    // Logits to weights; when they raise the maximum, the sums so far shrink.
    void weigh(float* logits, float& max, float& mass, float* vector) const {
        const float before = max;
        max = Larger{}(maximum(logits, kBlock), before);
        const float shift = max == -kInfinity ? 0.0f : max;
        if (max != before) {
            const float keep = exp_or_zero(before - shift);
            mass *= keep;
            for (int64_t col = 0; col < stride_; ++col) vector[col] *= keep;
        }
        float lane[kLanes] = {};
        for (int start = 0; start < kBlock; start += kLanes)
            UNMASK_LANES for (int i = 0; i < kLanes; ++i) {
                logits[start + i] = exp_or_zero(logits[start + i] - shift);
                lane[i] += logits[start + i];
            }
        mass += fold(lane, Sum{});
    }

    // Adds weights [rows, kBlock] x block's rows of the table to kStrip columns of the vectors, which begin at `col`.
    void multiply(int64_t block, int64_t col, const float* weights, float* strip, float* vectors) const {
        const int64_t id = block * kBlock, ids = smaller(kBlock, call_.table.rows - id);
        pack(id, ids, col, strip);
        for (int64_t row = 0; row < rows_; row += kRowTile)
            some<kRowTile>(rows_ - row, ids, weights + row * kBlock, strip, vectors + row * stride_);
    }

    void pack(int64_t id, int64_t ids, int64_t col, float* strip) const {
        const int64_t cols = smaller(kStrip, width_ - col);
        for (int64_t i = 0; i < ids; ++i, strip += kStrip) {
            copy_row(strip, call_.table, id + i, col, cols);
            for (int64_t j = cols; j < kStrip; ++j) strip[j] = 0.0f;
        }
    }

    template <int kRows>
    void some(int64_t rows, int64_t ids, const float* weights, const float* strip, float* vectors) const {
        if constexpr (kRows > 1)
            if (rows < kRows) return some<kRows - 1>(rows, ids, weights, strip, vectors);
        Vec acc[kRows][4];
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < 4; ++j) acc[r][j] = load(vectors + r * stride_ + j * kWidth);
        for (int64_t i = 0; i < ids; ++i, strip += kStrip)
            for (int r = 0; r < kRows; ++r)
                for (int j = 0; j < 4; ++j) acc[r][j] = weights[r * kBlock + i] * load(strip + j * kWidth) + acc[r][j];
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < 4; ++j) __builtin_memcpy(vectors + r * stride_ + j * kWidth, &acc[r][j], sizeof(Vec));
    }

    // The spans of a wave, in rising order, onto all before them.
    void merge(int64_t row, int64_t count) {
        float &max = max_[wave_ * chunk_ + row], &mass = mass_[wave_ * chunk_ + row], *to = embedding(row);
        for (int64_t slot = 0; slot < count; ++slot) {
            const float other = max_[slot * chunk_ + row], top = Larger{}(max, other);
            const float shift = top == -kInfinity ? 0.0f : top;
            const float keep = exp_or_zero(max - shift), add = exp_or_zero(other - shift);
            const float* from = vectors_ + (slot * chunk_ + row) * stride_;
            for (int64_t col = 0; col < width_; ++col) to[col] = to[col] * keep + from[col] * add;
            mass = mass * keep + mass_[slot * chunk_ + row] * add;
            max = top;
        }
    }

    void finish(int64_t row) {
        const float max = max_[wave_ * chunk_ + row], mass = mass_[wave_ * chunk_ + row];
        for (int64_t col = 0; col < width_; ++col) embedding(row)[col] /= mass;
        call_.lse[first_ + row] = logsumexp(max, mass);
    }
};

}  // namespace

void UNMASK_KERNEL(expected_embedding)(const EmbeddingCall& call) { Expectation(call).run(); }

}  // namespace unmask
