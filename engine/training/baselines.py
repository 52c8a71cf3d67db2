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
    """Mean −log p per held-out token (nats) of an interpolated Kneser–Ney trigram with discount 0.75.

    Each order backs off to the next by the discounted mass of its context; lower orders count distinct left
    neighbours, the unigram is smoothed towards uniform (Chen and Goodman 1999, section 2.7). The first two held-out
    tokens are read as context only.

    train, heldout: int64 token streams.
    """
    trigrams = _Counts.of(_ngram_codes(train, 3, vocab_size), vocab_size)
    bigrams = _Counts.of(trigrams.codes % vocab_size**2, vocab_size)
    unigrams = _Counts.of(bigrams.codes % vocab_size, vocab_size)
    codes = _ngram_codes(heldout, 3, vocab_size)
    law = unigrams.interpolate(codes % vocab_size, 1.0 / vocab_size)
    law = bigrams.interpolate(codes % vocab_size**2, law)
    law = trigrams.interpolate(codes, law)
    return float(-np.log(law).mean())


def _ngram_codes(ids: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """int64 [T − order + 1]: each n-gram as one number in base V, last token in the lowest digit."""
    codes = np.zeros(len(ids) - order + 1, dtype=np.int64)
    for offset in range(order):
        codes = codes * vocab_size + ids[offset : len(ids) - order + 1 + offset]
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

    def interpolate(self, codes: np.ndarray, lower: np.ndarray | float) -> np.ndarray:
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
