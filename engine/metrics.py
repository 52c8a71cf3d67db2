"""What finished texts are like, in numbers: entropy, diversity and repetition of their tokens, and their fit to a law.

A text is an int64 [L] of token ids; texts are a sequence of them, or an array [S, L]. Most functions give one value per
text, or a count and what it is a share of, so that a bootstrap can draw texts again. All of them grow or fall with the
length of the texts: compare texts of one length.
"""

from collections.abc import Callable, Sequence

import numpy as np

Texts = Sequence[np.ndarray] | np.ndarray


def entropies(texts: Texts) -> np.ndarray:
    """Unigram entropy of each text, nats per token, float64 [S]: −Σ_v (c_v / L) log(c_v / L), c_v = how often v occurs.

    Its mean over texts is the sentence entropy of Zheng et al. 2024 (arXiv 2409.02908). At most log L.
    """
    return np.array([_entropy(np.asarray(text)) for text in texts])


def distinct(texts: Texts, n: int) -> float:
    """Distinct n-grams of all texts together / n-grams of all texts: distinct-n of Li et al. 2016 (arXiv 1510.03055).

    They divide by tokens, this by n-grams, so that 1 is reached. It sees texts that are like each other, falls with
    their number, and has no bootstrap, as texts drawn twice repeat each other. NaN where no text has n tokens.
    """
    grams = [_ngrams(text, n) for text in texts]
    total = sum(map(len, grams))
    return len(np.unique(np.concatenate(grams), axis=0)) / total if total else float("nan")


def distinct_counts(texts: Texts, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct n-grams and n-grams of each text, float64 [S] each: distinct-n inside a text is their ratio."""
    grams = [_ngrams(text, n) for text in texts]
    return (
        np.array([len(np.unique(one, axis=0)) for one in grams], dtype=np.float64),
        np.array([len(one) for one in grams], dtype=np.float64),
    )


def repetition_counts(texts: Texts, n: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """n-grams that occurred before in the same text, and n-grams, of each text, float64 [S] each.

    Their ratio 1 − distinct n-grams / n-grams is seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319), there with n = 4.
    """
    different, total = distinct_counts(texts, n)
    return total - different, total


def perplexity(nats: np.ndarray | float, num_tokens: np.ndarray | float) -> np.ndarray | float:
    """exp(Σ nll / number of scored tokens), of totals over texts (Jelinek et al. 1977).

    Generative perplexity is this, with another model's nll of sampled texts. Texts that repeat themselves score well:
    read it beside their entropy.
    """
    return np.exp(np.divide(nats, num_tokens))


def exact_nll(values: np.ndarray, log_law: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """−log p(x) / L of each text, nats per token, float64 [S], where the law is known.

    values: [S, L], as `log_law` takes them; it gives log p [S]. For texts of the law itself the mean is H(p) / L; for
    texts of another law q it is (H(q) + KL(q ‖ p)) / L. A text outside of the law's support has ∞.
    """
    values = np.asarray(values)
    found = np.asarray(log_law(values), dtype=np.float64)
    if found.shape != values.shape[:1]:
        raise ValueError(f"log_law must give one value for each of {len(values)} texts, got shape {list(found.shape)}")
    return -found / values.shape[1]


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    """½ Σ_x |p(x) − q(x)|, from 0 to 1, of two laws given as arrays of one shape (Levin, Peres 2017, section 4.1)."""
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"laws must have one shape, got {list(one.shape)} and {list(other.shape)}")
    for law in (one, other):
        if not (law >= 0).all() or not np.isclose(law.sum(), 1, atol=1e-6):
            raise ValueError(
                f"laws must be probabilities that sum to 1, got {law.min():.6g} … with sum {law.sum():.6g}"
            )
    return float(np.abs(one - other).sum() / 2)


def _entropy(text: np.ndarray) -> float:
    counts = np.unique(text, return_counts=True)[1]
    return float((counts / len(text) * np.log(len(text) / counts)).sum())


def _ngrams(text: np.ndarray, n: int) -> np.ndarray:
    """[L − n + 1, n]: the n-grams of a text in order, none if it is shorter."""
    text = np.asarray(text)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return np.lib.stride_tricks.sliding_window_view(text, n) if len(text) >= n else text[:0].reshape(0, n)
