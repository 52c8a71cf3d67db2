"""Two honest baselines over the same ids as the denoisers: unigram and interpolated Kneser–Ney trigram."""

from dataclasses import dataclass

import numpy as np

DISCOUNT = 0.75


def unigram_nats(train: np.ndarray, heldout: np.ndarray, vocab_size: int) -> float:
    """Mean −log p per held-out token (nats) of a unigram law with one added count per id.

    train, heldout: int64 token streams.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[heldout].mean())


def trigram_nats(train: np.ndarray, heldout: np.ndarray, vocab_size: int) -> float:
    """Mean −log p per held-out token (nats) of a `Trigram`. The first two held-out tokens are read as context only.

    train, heldout: int64 token streams.
    """
    return float(Trigram.fit(train, vocab_size).nats(heldout[None])[0, 2:].mean())


@dataclass(frozen=True)
class Trigram:
    """An interpolated Kneser–Ney trigram with discount 0.75 (Chen and Goodman 1999, section 2.7), as it was fitted.

    Each order backs off to the next by the discounted mass of its context; lower orders count distinct left neighbours,
    the unigram is smoothed towards uniform.
    """

    vocab_size: int
    orders: tuple["_Counts", "_Counts", "_Counts"]

    @classmethod
    def fit(cls, train: np.ndarray, vocab_size: int) -> "Trigram":
        """train: int64 token stream [T], of at least three ids below `vocab_size`."""
        if len(train) < 3:
            raise ValueError(f"train must hold at least 3 tokens, got {len(train)}")
        trigrams = _Counts.of(_ngram_codes(train[None], 3, vocab_size)[0], vocab_size)
        bigrams = _Counts.of(trigrams.codes % vocab_size**2, vocab_size)
        return cls(vocab_size, (_Counts.of(bigrams.codes % vocab_size, vocab_size), bigrams, trigrams))

    def nats(self, texts: np.ndarray) -> np.ndarray:
        """−log p of each token of texts int64 [S, L], given the two before it in its own text; float64 [S, L].

        The first token of a text has the law of the unigram and the second that of the bigram, so that the sum over a
        text is −log of a probability of the whole text.
        """
        law = np.full(texts.shape, 1.0 / self.vocab_size)
        for order, counts in enumerate(self.orders[: texts.shape[1]], start=1):
            law[:, order - 1 :] = counts.interpolate(_ngram_codes(texts, order, self.vocab_size), law[:, order - 1 :])
        return -np.log(law)


def _ngram_codes(texts: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """int64 [S, L − order + 1]: each n-gram as one number in base V, last token in the lowest digit."""
    num = texts.shape[1] - order + 1
    codes = np.zeros((len(texts), num), dtype=np.int64)
    for offset in range(order):
        codes = codes * vocab_size + texts[:, offset : offset + num]
    return codes


@dataclass(frozen=True)
class _Counts:
    """Counts of n-grams and of their contexts, by sorted code."""

    vocab_size: int
    codes: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    context_counts: np.ndarray
    context_types: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray, vocab_size: int) -> "_Counts":
        unique, counts = np.unique(codes, return_counts=True)
        contexts, first, types = np.unique(unique // vocab_size, return_index=True, return_counts=True)
        return cls(vocab_size, unique, counts, contexts, np.add.reduceat(counts, first), types)

    def interpolate(self, codes: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p(last | context) of `codes`, backing off to `lower`; an unseen context is all back-off."""
        count = _lookup(self.codes, self.counts, codes)
        context_count = _lookup(self.contexts, self.context_counts, codes // self.vocab_size)
        context_types = _lookup(self.contexts, self.context_types, codes // self.vocab_size)
        seen = context_count > 0
        total = np.where(seen, context_count, 1)
        law = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * context_types * lower) / total
        return np.where(seen, law, lower)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
