"""The law of tiny samples under published algorithms, by enumeration, and whether samples have it."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations, permutations, product

import numpy as np
import torch
from scipy import stats

State = tuple[int, ...]
Step = Callable[[State], Iterable[tuple[State, float]]]


def law_after(start: State, steps: Iterable[Step]) -> dict[State, float]:
    """Probabilities of what may be there after these steps, one after the other."""
    law = {start: 1.0}
    for step in steps:
        after = Counter()
        for state, chance in law.items():
            for one, share in step(state):
                after[one] += chance * share
        law = after
    return law


def conditional(model, state: State) -> np.ndarray:
    """float64 [L, V], the logits of a live model."""
    with torch.no_grad():
        return model(torch.tensor([state])).logits[0].double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def drawn(law: np.ndarray, places: list[int]) -> Iterable[tuple[State, float]]:
    """All tokens of some places, drawn independently, with their probabilities."""
    for tokens in product(range(law.shape[-1]), repeat=len(places)):
        chance = float(np.prod([law[place, token] for place, token in zip(places, tokens, strict=True)]))
        if chance:
            yield tokens, chance


def written(state: State, places: Iterable[int], tokens: dict[int, int]) -> State:
    x = list(state)
    for place in places:
        x[place] = tokens[place]
    return tuple(x)


def confident(model, mask_id: int, end: int, count: int, law: Callable, score: Callable, order=None) -> Step:
    """A step that draws a token for every masked place before `end` and keeps the `count` with the best scores.

    law(logits) -> probabilities [L, V] to draw from; score(logits, place, token). order: the temperature at which
    places are drawn by their scores instead.
    """

    def step(state: State) -> Iterable[tuple[State, float]]:
        logits = conditional(model, state)
        places = [place for place in range(end) if state[place] == mask_id]
        for tokens, chance in drawn(law(logits), places):
            token = dict(zip(places, tokens, strict=True))
            scores = {place: score(logits, place, token[place]) for place in places}
            if order is None:
                yield written(state, sorted(places, key=lambda place: -scores[place])[:count], token), chance
            else:
                for kept, share in without_replacement(scores, order, count):
                    yield written(state, kept, token), chance * share

    return step


def without_replacement(scores: dict[int, float], temperature: float, count: int):
    """Sets of `count` places drawn one after the other, with chances proportional to exp(score / temperature)."""
    weights = {place: np.exp(score / temperature) for place, score in scores.items()}
    shares = Counter()
    for order in permutations(weights, count):
        left, share = sum(weights.values()), 1.0
        for place in order:
            share *= weights[place] / left
            left -= weights[place]
        shares[frozenset(order)] += share
    return shares.items()


def anywhere(model, mask_id: int, end: int, count: int, law: Callable) -> Step:
    """A step that reveals `count` masked places before `end`, all sets of them equally likely."""

    def step(state: State) -> Iterable[tuple[State, float]]:
        places = [place for place in range(end) if state[place] == mask_id]
        sets = list(combinations(places, count))
        for kept in sets:
            for tokens, chance in drawn(law(conditional(model, state)), list(kept)):
                yield written(state, kept, dict(zip(kept, tokens, strict=True))), chance / len(sets)

    return step


def independent(model, mask_id: int, share: float, law: Callable) -> Step:
    """A step that reveals every masked place with the same chance."""

    def step(state: State) -> Iterable[tuple[State, float]]:
        places = [place for place, token in enumerate(state) if token == mask_id]
        for count in range(len(places) + 1):
            for kept in combinations(places, count):
                chosen = share**count * (1 - share) ** (len(places) - count)
                for tokens, chance in drawn(law(conditional(model, state)), list(kept)) if chosen else ():
                    yield written(state, kept, dict(zip(kept, tokens, strict=True))), chosen * chance

    return step


def p_value(samples: torch.Tensor, law: dict[State, float]) -> float:
    """Of the χ² test that samples int64 [N, L] have a law; outcomes that are expected less than five times as one."""
    counts, total = Counter(map(tuple, samples.tolist())), len(samples)
    assert abs(sum(law.values()) - 1) < 1e-9 and all(law.get(outcome, 0) > 0 for outcome in counts)
    common = [outcome for outcome, chance in law.items() if chance * total >= 5]
    observed = np.array([*(counts[outcome] for outcome in common), 0.0])
    expected = np.array([*(law[outcome] * total for outcome in common), 0.0])
    observed[-1], expected[-1] = total - observed.sum(), total - expected.sum()
    kept = expected > 1e-6 * total
    return float(stats.chisquare(observed[kept], expected[kept] * observed[kept].sum() / expected[kept].sum()).pvalue)
