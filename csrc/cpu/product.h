// Tiles of a head's logits: given ones copied, others from a skinny product. Included once per instruction set.
#pragma once

#include <memory>
#include <type_traits>

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

// Columns [col, col + n) of a row, widened.
template <class T>
inline void copy_row(float* to, const Matrix& from, int64_t row, int64_t col, int64_t n) {
    const T* start = at<T>(from, row, col);
    if (from.col_stride == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = widen(start[i]);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = widen(start[i * from.col_stride]);
}
inline void copy_row(float* to, const Matrix& from, int64_t row, int64_t col, int64_t n) {
    if (from.type == Type::f32) return copy_row<float>(to, from, row, col, n);
    if (from.type == Type::f16) return copy_row<fp16>(to, from, row, col, n);
    copy_row<bf16>(to, from, row, col, n);
}
inline void copy_row(bf16* to, const Matrix& from, int64_t row, int64_t col, int64_t n) {
    const bf16* start = at<bf16>(from, row, col);
    for (int64_t i = 0; i < n; ++i) to[i] = start[i * from.col_stride];
}

// Where tiles come from. Rows are served in chunks: each is prepared once, then tiles of the chunk may be asked for by
// any thread. A logit's bits do not depend on the tile, the chunk or the rows beside it.
class Logits {
   public:
    const int64_t chunk;  // the most rows of a chunk

    virtual ~Logits() = default;
    virtual size_t bytes(int) const { return 0; }  // of the memory that allocate takes for so many threads
    virtual void allocate(Scratch&, int) {}
    virtual void prepare(int64_t) {}  // row of the chunk

    // Logits of ids [id, id + count), count <= kBlock, into tile [rows, kBlock]; up to three more columns of a row may
    // be written.
    virtual void tile(int64_t id, int64_t count, int64_t rows, float* tile, int thread) const = 0;

    void start(int64_t row) { first_ = row; }  // the chunk's first row

   protected:
    Logits(const Head& head, int64_t chunk) : chunk(smaller(chunk, head.num_rows)), head_(head) {}

    int64_t row(int64_t r) const { return head_.row(first_ + r); }  // of hidden

    const Head head_;

   private:
    int64_t first_ = 0;
};

class Given final : public Logits {
   public:
    explicit Given(const Head& head) : Logits(head, 16) {}

    void tile(int64_t id, int64_t count, int64_t rows, float* tile, int) const override {
        for (int64_t r = 0; r < rows; ++r) copy_row(tile + r * kBlock, head_.hidden, row(r), id, count);
    }
};

// kRowTile rows of hidden against four rows of weight at a time. A logit is one accumulator of kWidth lanes, summed over
// the columns in order and folded by a fixed tree: the same sequence of operations in every tile.
template <class Dot>
class Product final : public Logits {
    using Hidden = typename Dot::Hidden;
    using Weight = typename Dot::Weight;
    static constexpr bool kWidens = sizeof(Weight) < sizeof(Hidden);
    using Packed = std::conditional_t<kWidens, Widened<float>, Dot>;  // of weights held as hidden rows are
    static constexpr int64_t kBytes = 1 << 20;  // of a chunk's rows: they stay in the second-level cache

   public:
    explicit Product(const Head& head)
        : Logits(head, larger(kRowTile, smaller(kMaxChunk, kBytes / (head.hidden.cols * sizeof(Hidden))))),
          cols_(head.hidden.cols), stride_(round_up(cols_, Dot::kStep)) {}

    size_t bytes(int threads) const override {
        return Scratch::padded((chunk + threads * 4) * stride_ * sizeof(Hidden));
    }
    void allocate(Scratch& scratch, int threads) override {
        hidden_ = scratch.take<Hidden>((chunk + threads * 4) * stride_);
        weights_ = hidden_ + chunk * stride_;
    }

    void prepare(int64_t r) override {
        Hidden* to = hidden_ + r * stride_;
        copy_row(to, head_.hidden, row(r), 0, cols_);
        for (int64_t col = cols_; col < stride_; ++col) to[col] = Hidden{};
    }

    void tile(int64_t id, int64_t count, int64_t rows, float* tile, int thread) const override {
        const int64_t tiles = (rows + kRowTile - 1) / kRowTile;  // of nearly equal height
        for (int64_t j = 0; j < count; j += 4, tile += 4) {
            const Weight* w[4];
            for (int64_t i = 0; i < 4; ++i) w[i] = at<Weight>(head_.weight, id + smaller(j + i, count - 1));
            if (cols_ == stride_ && (tiles == 1 || !kWidens)) {
                column<Dot>(w, w[0], tiles, rows, tile);
            } else {
                Hidden* packed = weights_ + thread * 4 * stride_;
                for (int i = 0; i < 4; ++i) pack(packed + i * stride_, w[i]);
                const Hidden* const from[4] = {packed, packed + stride_, packed + 2 * stride_, packed + 3 * stride_};
                column<Packed>(from, w[0], tiles, rows, tile);
            }
        }
    }

   private:
    const int64_t cols_, stride_;
    Hidden* hidden_ = nullptr;   // [chunk, stride], zeros after the last column
    Hidden* weights_ = nullptr;  // [threads, 4, stride], likewise: narrower ones for several tiles, or an odd number

    // What a tile asks for while it computes: a few bytes ahead at every step.
    struct Fetch {
        const char* next;
        int64_t pace;
    };

    // Tiles of all rows against the weights w; each fetches a part of the four rows of weight after those at `source`.
    template <class D>
    void column(const typename D::Weight* const (&w)[4], const Weight* source, int64_t tiles, int64_t rows,
                float* out) const {
        const int64_t bytes = 4 * head_.weight.row_stride * sizeof(Weight), pace = bytes * D::kStep / (stride_ * tiles);
        const char* next = reinterpret_cast<const char*>(source) + bytes;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = t * rows / tiles, height = (t + 1) * rows / tiles - first;
            const Fetch fetch{next + t * bytes / tiles, pace};
            dots<D, kRowTile>(height, hidden_ + first * stride_, w, fetch, out + first * kBlock);
        }
    }

    template <class D, int kRows>
    void dots(int64_t rows, const Hidden* h, const typename D::Weight* const (&w)[4], Fetch fetch, float* out) const {
        if (rows == kRows) return dots<D, kRows>(h, w, fetch, out);
        if constexpr (kRows > 1) dots<D, kRows - 1>(rows, h, w, fetch, out);
    }

    template <class D, int kRows>
    void dots(const Hidden* h, const typename D::Weight* const (&w)[4], Fetch fetch, float* out) const {
        Vec acc[kRows][4] = {};
        for (int64_t col = 0; col < stride_; col += D::kStep, fetch.next += fetch.pace) {
            typename D::Lanes lanes[kRows];
            for (int r = 0; r < kRows; ++r) lanes[r] = D::lanes(h + r * stride_ + col);
            for (int j = 0; j < 4; ++j) {
                __builtin_prefetch(fetch.next + j * 64);
                for (int r = 0; r < kRows; ++r) acc[r][j] = D::step(acc[r][j], lanes[r], w[j] + col);
            }
        }
        store_sums(acc, out, kBlock);
    }

    void pack(Hidden* to, const Weight* from) const {
        int64_t col = 0;
        if constexpr (kWidens) {
            for (; col + kWidth <= cols_; col += kWidth) {
                const Vec v = load(from + col);
                __builtin_memcpy(to + col, &v, sizeof v);
            }
            for (; col < cols_; ++col) to[col] = widen(from[col]);
        } else {
            __builtin_memcpy(to, from, cols_ * sizeof(Weight));
        }
        for (col = cols_; col < stride_; ++col) to[col] = Hidden{};
    }
};

template <class Source>
std::unique_ptr<Logits> make(const Head& head) {
    return std::unique_ptr<Logits>(new Source(head));
}

inline std::unique_ptr<Logits> make_logits(const Head& head) {
    if (!head.weight.data) return make<Given>(head);
    if (head.weight.type == Type::f32) return make<Product<Widened<float>>>(head);
    if (head.weight.type == Type::f16) return make<Product<Widened<fp16>>>(head);
    return head.hidden.type == Type::bf16 ? make<Product<Bf16Dot>>(head) : make<Product<Widened<bf16>>>(head);
}

}  // namespace

}  // namespace unmask
