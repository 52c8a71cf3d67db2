// Tiles of a head's logits: given ones copied, others from a skinny product. Included once per instruction set.
#pragma once

#include <memory>

#include "../noise.h"
#include "matrix.h"
#include "parallel.h"
#include "simd.h"

namespace unmask {
namespace {

constexpr int kBlock = kNoiseBlock;
constexpr int kMaxChunk = 128;  // rows

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

// Where tiles come from. Rows are served in chunks: each is prepared once, then tiles of the chunk may be asked for by
// any thread. A logit's bits do not depend on the tile, the chunk or the rows beside it.
class Logits {
   public:
    const int64_t chunk;  // rows
    const int64_t span;   // noise blocks that a thread should take at a time

    virtual ~Logits() = default;
    virtual size_t bytes() const { return 0; }  // of the memory that allocate takes
    virtual void allocate(Scratch&) {}
    virtual void prepare(int64_t) {}  // row of the chunk

    // Logits of ids [id, id + count), count <= kBlock, into tile [rows, kBlock]; up to three more columns of a row may
    // be written.
    virtual void tile(int64_t id, int64_t count, int64_t rows, float* tile) const = 0;

    void start(int64_t row) { first_ = row; }  // the chunk's first row

   protected:
    Logits(const Head& head, int64_t chunk, int64_t span)
        : chunk(smaller(chunk, head.num_rows)), span(span), head_(head) {}

    const Head head_;
    int64_t first_ = 0;
};

template <class T>
class Given final : public Logits {
   public:
    explicit Given(const Head& head) : Logits(head, 16, 8) {}  // whole pages, small tables

    void tile(int64_t id, int64_t count, int64_t rows, float* tile) const override {
        for (int64_t row = 0; row < rows; ++row)
            copy_row(tile + row * kBlock, at<T>(head_.hidden, head_.row(first_ + row), id), count, head_.hidden.col_stride);
    }
};

// kRowTile rows of hidden against four rows of weight at a time. A logit is one accumulator of kWidth lanes, summed over
// the columns in order and folded by a fixed tree: the same sequence of operations in every tile.
template <class Dot>
class Product final : public Logits {
    using Hidden = typename Dot::Hidden;
    using Weight = typename Dot::Weight;

   public:
    explicit Product(const Head& head)
        : Logits(head, kMaxChunk, 1), cols_(head.hidden.cols), stride_(round_up(cols_, Dot::kStep)) {}

    size_t bytes() const override { return Scratch::padded(chunk * stride_ * sizeof(Hidden)); }
    void allocate(Scratch& scratch) override { packed_ = scratch.take<Hidden>(chunk * stride_); }

    void prepare(int64_t row) override {
        Hidden* to = packed_ + row * stride_;
        const Matrix& from = head_.hidden;
        if (from.type == Type::bf16)
            copy_row(to, at<bf16>(from, head_.row(first_ + row)), cols_, from.col_stride);
        else if constexpr (sizeof(Hidden) == 4)
            copy_row(to, at<float>(from, head_.row(first_ + row)), cols_, from.col_stride);
        for (int64_t col = cols_; col < stride_; ++col) to[col] = Hidden{};
    }

    void tile(int64_t id, int64_t count, int64_t rows, float* tile) const override {
        for (int64_t row = 0; row < rows; row += kRowTile)
            for (int64_t j = 0; j < count; j += 4) {
                const Weight* w[4];
                for (int64_t i = 0; i < 4; ++i) w[i] = at<Weight>(head_.weight, id + smaller(j + i, count - 1));
                const Hidden* h = packed_ + row * stride_;
                float* to = tile + row * kBlock + j;
                if (row + kRowTile <= rows)
                    dots<kRowTile>(h, w, to);
                else
                    rest<kRowTile - 1>(rows - row, h, w, to);
            }
    }

   private:
    const int64_t cols_, stride_;
    Hidden* packed_ = nullptr;  // [chunk, stride], zeros after the last column

    template <int kRows>
    void dots(const Hidden* h, const Weight* const (&w)[4], float* out) const {
        Vec acc[kRows][4] = {};
        auto advance = [&](int64_t col, const Weight* const (&from)[4]) {
            typename Dot::Lanes lanes[kRows];
            for (int r = 0; r < kRows; ++r) lanes[r] = Dot::lanes(h + r * stride_ + col);
            for (int j = 0; j < 4; ++j)
                for (int r = 0; r < kRows; ++r) acc[r][j] = Dot::step(acc[r][j], lanes[r], from[j]);
        };
        int64_t col = 0;
        for (; col + Dot::kStep <= cols_; col += Dot::kStep) {
            const Weight* const from[4] = {w[0] + col, w[1] + col, w[2] + col, w[3] + col};
            advance(col, from);
        }
        if (col < cols_) {
            Weight rest[4][Dot::kStep] = {};
            for (int j = 0; j < 4; ++j) __builtin_memcpy(rest[j], w[j] + col, (cols_ - col) * sizeof(Weight));
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
            if (rows == kRows) return dots<kRows>(h, w, out);
            rest<kRows - 1>(rows, h, w, out);
        }
    }
};

template <class Source>
std::unique_ptr<Logits> make(const Head& head) {
    return std::unique_ptr<Logits>(new Source(head));
}

inline std::unique_ptr<Logits> make_logits(const Head& head) {
    const bool narrow = head.hidden.type == Type::bf16;
    if (!head.weight.data) return narrow ? make<Given<bf16>>(head) : make<Given<float>>(head);
    if (head.weight.type == Type::f32) return make<Product<Widened<float>>>(head);
    return narrow ? make<Product<Bf16Dot>>(head) : make<Product<Widened<bf16>>>(head);
}

}  // namespace

#define UNMASK_JOIN(a, b) a##_##b
#define UNMASK_EXPAND(a, b) UNMASK_JOIN(a, b)
#define UNMASK_KERNEL(operator) UNMASK_EXPAND(operator, UNMASK_ISA)  // its name in this compilation

}  // namespace unmask
