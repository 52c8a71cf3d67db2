"""How good are the samples of a schedule? Measures of its texts, beside those of other schedules and of real text.

All schedules sample with one seed: text i has the same reveal times and the same noise under each of them (common
random numbers). So texts are compared in pairs, and a difference is known better than either side of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from unmask import metrics
from unmask.cost import Saving
from unmask.denoiser import Denoiser
from unmask.progress import Progress
from unmask.reveal import Reveal
from unmask.run import Run
from unmask.sampler import Sampler
from unmask.samples import Samples, decode
from unmask.schedule import Schedule
from unmask.study import bootstrap
from unmask.study.bootstrap import Interval
from unmask.study.scorer import Scores
from unmask.timeline import Tick

DISTINCT = 1, 2, 3
REPEATED = 4
REAL = None  # real text's place among the labels of schedules
# By name, two columns float64 [texts]: the measure is a statistic of their sums, see `statistic`.
Columns = dict[str, tuple[np.ndarray, np.ndarray]]
Follow = Callable[[str, int, int], object]


class TextScorer(Protocol):
    """What `evaluate` asks of a scorer, such as `unmask.study.scorer.Scorer`."""

    name: str

    def score(self, texts: list[str], on_text: Callable[[], object]) -> Scores: ...


@dataclass(frozen=True)
class Quality:
    """Measures of some texts.

    measures: by name, with 95 % intervals by bootstrap over texts; those that the texts are too short for are left out.
        entropy (nats per token), distinct_1 to distinct_3 and repetition_4 inside a text: see `unmask.metrics`;
        exact_nll (nats per token), where the law is known;
        nll (nats per token of the scorer) and perplexity, its exponential, with a scorer.
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


@dataclass(frozen=True)
class Row:
    """A schedule: its texts, how they differ from those of the first schedule (None for that one), and their price.

    saved: FLOPs, against the costliest model alone. seconds: of sampling; the first schedule's include the warm-up.
    nfe: network calls per text, by model.
    """

    schedule: str
    quality: Quality
    difference: Difference | None
    saved: Saving
    seconds: float
    nfe: Mapping[str, float]

    @classmethod
    def of(cls, sampler: Sampler, samples: Samples, quality: Quality, difference: Difference | None) -> "Row":
        stats = samples.stats
        return cls(
            str(sampler.schedule), quality, difference, stats.cost.saving, stats.seconds["total"], dict(stats.nfe)
        )

    def to_json(self) -> dict:
        difference = self.difference and self.difference.to_json()
        return {**asdict(self), "quality": self.quality.to_json(), "difference": difference}


@dataclass(frozen=True)
class Evaluation:
    """Rows of schedules by label, in the order given, and the quality of as much real text, if there was any."""

    num_samples: int
    length: int
    reveal: str
    seed: int
    scorer: str | None
    rows: Mapping[str, Row]
    heldout: Quality | None

    def to_json(self) -> dict:
        """What `unmask study evaluate --json` prints; an interval is {"value", "low", "high"}."""
        rows = {label: row.to_json() for label, row in self.rows.items()}
        return {**asdict(self), "rows": rows, "heldout": self.heldout and self.heldout.to_json()}


def evaluate(
    models: Mapping[str, Denoiser],
    schedules: Mapping[str, Schedule | str],
    *,
    num_samples: int,
    length: int,
    reveal: Reveal,
    seed: int = 0,
    max_batch: int = 16,
    scorer: TextScorer | None = None,
    heldout_windows: np.ndarray | None = None,
    log_law: Callable[[np.ndarray], np.ndarray] | None = None,
    on_samples: Callable[[str, Samples], object] = lambda label, samples: None,
    follow: Follow = lambda phase, done, total: None,
) -> Evaluation:
    """Sample `num_samples` texts of `length` tokens with each schedule, and measure them.

    schedules: by label; the first is what others are compared with. scorer: scores the decoded texts, in tokens of its
    own. heldout_windows: real text, int64 [num_samples, length]. log_law: log p [S] of token ids [S, L], where the
    data's law is known. on_samples takes each schedule's samples when they are done, before any scoring; follow(phase,
    done, total) hears of progress.

    Raises:
        ValueError: a schedule that does not fit the models or the steps, fewer than two samples, windows of another
            shape, a scorer for models without a tokenizer; nothing has run then.
    """
    samplers = _samplers(models, schedules, reveal, max_batch)
    _check(samplers, num_samples, length, seed, scorer, heldout_windows)
    count, runs = _Count(follow, len(samplers) * num_samples * length), {}
    for label, sampler in samplers.items():
        runs[label] = sampler.sample(num_samples, length, seed=seed, progress=count)
        on_samples(label, runs[label])
    texts = {label: samples.tokens.numpy() for label, samples in runs.items()}
    if heldout_windows is not None:
        texts[REAL] = heldout_windows
    first, sampler = next(iter(samplers.items()))
    scores = {} if scorer is None else _scores(scorer, texts, sampler.tokenizer, follow)
    columns = {label: columns_of(tokens, scores.get(label), log_law) for label, tokens in texts.items()}
    drawn = bootstrap.resamples(num_samples)
    qualities = {label: quality_of(texts[label], columns[label], scores.get(label), drawn) for label in texts}
    rows = {}
    for label, samples in runs.items():
        difference = None if label == first else difference_of(columns[first], columns[label], drawn)
        rows[label] = Row.of(samplers[label], samples, qualities[label], difference)
    name = None if scorer is None else scorer.name
    return Evaluation(num_samples, length, str(reveal), seed, name, rows, qualities.get(REAL))


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
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, for intervals, got {num_samples}")


def _samplers(
    models: Mapping[str, Denoiser], schedules: Mapping[str, Schedule | str], reveal: Reveal, max_batch: int
) -> dict[str, Sampler]:
    if not schedules:
        raise ValueError("schedules must hold at least one schedule, got none")
    options = {"reveal": reveal, "max_batch": max_batch}
    return {label: Sampler(models, schedule=schedule, **options) for label, schedule in schedules.items()}


def _check(
    samplers: Mapping[str, Sampler],
    num_samples: int,
    length: int,
    seed: int,
    scorer: TextScorer | None,
    windows: np.ndarray | None,
) -> None:
    check_num_samples(num_samples)
    for sampler in samplers.values():
        sampler.plan(1, length, seed=seed)  # refuses a bad length, and a schedule that does not fit the steps
    if windows is not None and windows.shape != (num_samples, length):
        raise ValueError(f"heldout_windows must have shape {[num_samples, length]}, got {list(windows.shape)}")
    if scorer is not None and next(iter(samplers.values())).tokenizer is None:
        raise ValueError("scorer needs text, and so models with a tokenizer, got none with one")


class _Count(Progress):
    """Tokens revealed, over the runs of all schedules."""

    def __init__(self, follow: Follow, total: int) -> None:
        self.follow, self.done, self.total = follow, 0, total

    def update(self, run: Run, tick: Tick) -> None:
        self.done += int(tick.row_counts.sum())
        self.follow("sampling", self.done, self.total)


def _scores(
    scorer: TextScorer, texts: Mapping[str | None, np.ndarray], tokenizer: Tokenizer, follow: Follow
) -> dict[str | None, Scores]:
    done, total = 0, sum(map(len, texts.values()))

    def on_text() -> None:
        nonlocal done
        done += 1
        follow("scoring", done, total)

    return {label: scorer.score([decode(one, tokenizer) for one in tokens], on_text) for label, tokens in texts.items()}


def _intervals(measures: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: interval._asdict() for name, interval in measures.items()}
