"""Measures of texts, and of how the texts of one schedule differ from those of another, text by text."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from unmask import metrics
from unmask.samples import decode
from unmask.study import bootstrap
from unmask.study.bootstrap import MIN_UNITS, Interval
from unmask.study.scorer import Scores

DISTINCT = 1, 2, 3
REPEATED = 4
# By name, two columns float64 [texts]: the measure is a statistic of their sums, see `statistic`.
Columns = dict[str, tuple[np.ndarray, np.ndarray]]


class TextScorer(Protocol):
    """What a study asks of a scorer, such as `unmask.study.scorer.Scorer`.

    It gets decoded texts; or token ids int64 [S, L] if its attribute `reads_ids` is true, which may be left out.
    So may its attribute `fingerprint`, a text that tells it from others of the same name.
    """

    name: str

    def score(self, texts: list[str] | np.ndarray, on_text: Callable[[], object]) -> Scores: ...


@dataclass(frozen=True)
class Quality:
    """Measures of some texts.

    measures: by name, with 95 % intervals by bootstrap over texts; those that the texts are too short for are left out.
        entropy (nats per token), distinct_1 to distinct_3 and repetition_4 inside a text: see `unmask.metrics`;
        exact_nll (nats per token), where the law is known;
        nll (nats per token of the scorer) and perplexity, its exponential, with a scorer;
        mauve, from 0 to 1, with an embedder: see `unmask.study.distance`. That of real text, against other real text,
        is what a perfect sampler would reach with as many texts.
    pooled_distinct: by n, `metrics.distinct` of all texts together.
    num_scored, num_cut: tokens that the scorer scored, and that lay behind the end of its context; None without one.
    """

    measures: Mapping[str, Interval]
    pooled_distinct: Mapping[int, float]
    num_scored: int | None
    num_cut: int | None

    def to_json(self) -> dict:
        return {**asdict(self), "measures": _intervals(self.measures)}


@dataclass(frozen=True)
class Difference:
    """What a schedule's texts have more than the first one's, text by text; 95 % intervals by paired bootstrap.

    measures: this schedule's less the first one's, by name. perplexity_ratio: this one's / the first one's; None
    without a scorer.
    """

    measures: Mapping[str, Interval]
    perplexity_ratio: Interval | None

    def to_json(self) -> dict:
        ratio = self.perplexity_ratio
        return {"measures": _intervals(self.measures), "perplexity_ratio": ratio and ratio._asdict()}


def columns_of(
    tokens: np.ndarray,
    scores: Scores | None = None,
    log_law: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Columns:
    """The measures of texts [S, L] as columns; a bootstrap over texts draws rows of them."""
    each = np.ones(len(tokens))
    columns = {"entropy": (metrics.entropies(tokens), each)}
    columns |= {f"distinct_{n}": metrics.distinct_counts(tokens, n) for n in DISTINCT}
    columns[f"repetition_{REPEATED}"] = metrics.repetition_counts(tokens, REPEATED)
    if log_law is not None:
        columns["exact_nll"] = metrics.exact_nll(tokens, log_law), each
        if not np.isfinite(columns["exact_nll"][0]).all():
            raise ValueError("log_law must give every text a probability, got 0 or NaN for one")
    if scores is not None:
        columns["nll"] = columns["perplexity"] = scores.nats, scores.num_tokens.astype(np.float64)
    return {name: (sums, counts) for name, (sums, counts) in columns.items() if counts.any()}


def statistic(name: str) -> Callable[..., np.ndarray]:
    """What a measure makes of the sums of its two columns."""
    return metrics.perplexity if name == "perplexity" else np.divide


def difference_of(first: Columns, other: Columns, drawn: np.ndarray) -> Difference:
    """`other` less `first`, whose texts are drawn together."""

    def less(name: str) -> Callable[..., np.ndarray]:
        of = statistic(name)
        return lambda a, num_a, b, num_b: of(b, num_b) - of(a, num_a)

    def ratio(a, num_a, b, num_b):
        return np.exp(np.divide(b, num_b) - np.divide(a, num_a))

    pairs = {name: (*first[name], *other[name]) for name in first if name in other}
    measures = {name: bootstrap.of_sums(less(name), pair, drawn) for name, pair in pairs.items()}
    return Difference(measures, bootstrap.of_sums(ratio, pairs["nll"], drawn) if "nll" in pairs else None)


def quality_of(tokens: np.ndarray, columns: Columns, scores: Scores | None, drawn: np.ndarray) -> Quality:
    return Quality(
        {name: bootstrap.of_sums(statistic(name), pair, drawn) for name, pair in columns.items()},
        {n: metrics.distinct(tokens, n) for n in DISTINCT if tokens.shape[1] >= n},
        None if scores is None else int(scores.num_tokens.sum()),
        None if scores is None else int(scores.num_cut.sum()),
    )


def check_num_samples(num_samples: int) -> None:
    if num_samples < MIN_UNITS:
        raise ValueError(
            f"num_samples must be at least {MIN_UNITS}, as 95 % intervals over fewer texts cover less than 90 %, "
            f"got {num_samples}"
        )


def check_readable(scorer: TextScorer | None, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError for a scorer that wants text where there is no tokenizer to decode one."""
    if scorer is not None and not getattr(scorer, "reads_ids", False) and tokenizer is None:
        raise ValueError("scorer needs text, and so models with a tokenizer, got none with one")


def scores_of(
    scorer: TextScorer, tokens: np.ndarray, tokenizer: Tokenizer | None, on_text: Callable[[], object]
) -> Scores:
    """What a scorer says of token ids int64 [S, L], or of the texts that they are."""
    if getattr(scorer, "reads_ids", False):
        return scorer.score(tokens, on_text)
    return scorer.score([decode(one, tokenizer) for one in tokens], on_text)


def _intervals(measures: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: interval._asdict() for name, interval in measures.items()}
