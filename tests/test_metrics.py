"""Each metric against numbers worked out by hand and against its definition in plain loops."""

import math
from collections import Counter
from itertools import chain, combinations, pairwise, product

import numpy as np
import pytest
from toys import HiddenMarkov

from unmask import metrics


def random_texts(seed, num=12, num_ids=4):
    """Ragged texts of few ids, so that n-grams occur again."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, num_ids, rng.integers(1, 15)) for _ in range(num)]


def grams(text, n):
    return [tuple(text[i : i + n].tolist()) for i in range(len(text) - n + 1)]


def test_entropy_by_hand():
    texts = [[5, 5, 7, 7], [1, 2, 3, 4], [9, 9, 9], [0, 0, 0, 1]]
    expected = [math.log(2), math.log(4), 0, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    assert metrics.entropies([np.array(text) for text in texts]) == pytest.approx(expected)
    assert metrics.entropies(np.array([[3, 3], [3, 4]])) == pytest.approx([0, math.log(2)])


@pytest.mark.parametrize("seed", range(5))
def test_entropy_is_its_definition(seed):
    texts = random_texts(seed)
    for text, found in zip(texts, metrics.entropies(texts), strict=True):
        shares = [count / len(text) for count in Counter(text.tolist()).values()]
        assert found == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_distinct_and_repetition_by_hand():
    text, other = np.array([1, 2, 1, 2]), np.array([1, 2, 3])
    different, total = metrics.distinct_counts([text, other], 2)
    assert different.tolist() == [2, 2] and total.tolist() == [3, 2]
    assert metrics.distinct([text, other], 2) == 3 / 5  # 12, 21, 23
    assert metrics.distinct([other, other], 1) == 3 / 6
    again, total = metrics.repetition_counts([np.array([1, 2, 3, 4, 1, 2, 3, 4]), np.full(7, 3), other])
    assert again.tolist() == [1, 3, 0] and total.tolist() == [5, 4, 0]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_distinct_and_repetition_are_their_definitions(seed, n):
    texts = random_texts(seed)
    every = [grams(text, n) for text in texts]
    assert metrics.distinct(texts, n) == len(set(chain(*every))) / sum(map(len, every))
    different, total = metrics.distinct_counts(texts, n)
    assert different.tolist() == [len(set(one)) for one in every] and total.tolist() == [len(one) for one in every]
    before = [sum(gram in one[:i] for i, gram in enumerate(one)) for one in every]
    again, total = metrics.repetition_counts(texts, n)
    assert again.tolist() == before and total.tolist() == [len(one) for one in every]


def test_texts_too_short_for_an_ngram_have_none():
    assert math.isnan(metrics.distinct([np.array([1, 2])], 3))
    assert metrics.distinct_counts(np.array([[1, 2]]), 3)[1].tolist() == [0]
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        metrics.distinct([np.array([1, 2])], 0)


def test_perplexity_weighs_tokens_not_texts():
    nats, tokens = np.array([3 * math.log(2), math.log(4)]), np.array([3, 1])
    assert metrics.perplexity(nats.sum(), tokens.sum()) == pytest.approx(2 ** (5 / 4))


def test_exact_nll_against_enumeration():
    """Its mean over the law is the law's entropy, over another law that one's entropy and the divergence from it."""
    rng, length = np.random.default_rng(0), 4
    p, q = (
        HiddenMarkov(length, rng.dirichlet([1, 1]), rng.dirichlet([1, 1], 2), rng.dirichlet([1, 1, 1], 2))
        for _ in range(2)
    )
    sequences = np.array(list(product(range(3), repeat=length)))
    nll = metrics.exact_nll(sequences, p.log_law)
    for sequence, found in zip(sequences, nll, strict=True):
        paths = product(range(2), repeat=length)
        assert math.exp(-found * length) == pytest.approx(sum(path_probability(p, path, sequence) for path in paths))
    own, other = (np.exp(law.log_law(sequences)) for law in (p, q))
    assert own @ nll == pytest.approx(-(own * np.log(own)).sum() / length)
    divergence = (other * np.log(other / own)).sum()
    assert other @ nll == pytest.approx((divergence - (other * np.log(other)).sum()) / length)


def path_probability(law, path, sequence):
    steps = pairwise(path)
    chance = law.start[path[0]] * math.prod(law.transition[a, b] for a, b in steps)
    return chance * math.prod(law.emission[state, value] for state, value in zip(path, sequence, strict=True))


def test_exact_nll_refuses_a_law_of_another_shape():
    with pytest.raises(ValueError, match=r"one value for each of 2 texts, got shape \[2, 3\]"):
        metrics.exact_nll(np.zeros((2, 3)), lambda values: values)


def test_total_variation_by_hand():
    assert metrics.total_variation([0.5, 0.5], [0.25, 0.75]) == 0.25
    assert metrics.total_variation([[1, 0], [0, 0]], [[0, 0], [0.5, 0.5]]) == 1
    assert metrics.total_variation([0.2, 0.8], [0.2, 0.8]) == 0


@pytest.mark.parametrize("seed", range(3))
def test_total_variation_is_the_largest_difference_of_an_event(seed):
    one, other = np.random.default_rng(seed).dirichlet(np.full(6, 0.5), 2)
    events = chain.from_iterable(combinations(range(6), size) for size in range(7))
    largest = max(one[list(event)].sum() - other[list(event)].sum() for event in events)
    assert metrics.total_variation(one, other) == pytest.approx(largest)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([1], [0.5, 0.5], r"laws must have one shape, got \[1\] and \[2\]"),
        ([0.5, 0.4], [0.5, 0.5], "sum to 1, got 0.4 … with sum 0.9"),
        ([1.5, -0.5], [0.5, 0.5], "must be probabilities"),
        ([math.nan, 1], [0.5, 0.5], "must be probabilities"),
    ],
)
def test_total_variation_takes_laws_only(one, other, message):
    with pytest.raises(ValueError, match=message):
        metrics.total_variation(one, other)
