"""How good are the samples of a schedule? Measures of its texts, beside those of other schedules and of real text.

All schedules sample with one seed: text i has the same reveal times and the same noise under each of them (common
random numbers). So texts are compared in pairs, and a difference is known better than either side of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from unmask.choose import Categorical
from unmask.cost import Saving
from unmask.denoiser import Denoiser
from unmask.progress import Progress
from unmask.reveal import Reveal
from unmask.run import Run
from unmask.sampler import Sampler
from unmask.samples import Samples, decode
from unmask.schedule import Schedule
from unmask.study import bootstrap
from unmask.study.bootstrap import MIN_UNITS, Interval
from unmask.study.distance import Mauve, check_installed, num_clusters
from unmask.study.embedder import Embeddings
from unmask.study.law import Exact, output_law
from unmask.study.quality import (
    Difference,
    Quality,
    TextScorer,
    check_num_samples,
    check_readable,
    columns_of,
    difference_of,
    quality_of,
    scores_of,
)
from unmask.study.scorer import Scores
from unmask.timeline import Tick

REAL = None  # real text's place among the labels of schedules
Follow = Callable[[str, int, int], object]


class TextEmbedder(Protocol):
    """What `evaluate` asks of an embedder, such as `unmask.study.embedder.Embedder`."""

    name: str

    def embed(self, texts: list[str], on_text: Callable[[], object]) -> Embeddings: ...


@dataclass(frozen=True)
class Row:
    """A schedule: its texts, how they differ from those of the first schedule (None for that one), and their price.

    saved: FLOPs, against the costliest model alone. seconds: of sampling; the first schedule's include the warm-up.
    nfe: network calls per text, by model. exact: of the schedule's law itself, where the data's law is known.
    """

    schedule: str
    quality: Quality
    difference: Difference | None
    saved: Saving
    seconds: float
    nfe: Mapping[str, float]
    exact: Exact | None = None

    @classmethod
    def of(
        cls,
        sampler: Sampler,
        samples: Samples,
        quality: Quality,
        difference: Difference | None,
        exact: Exact | None = None,
    ) -> "Row":
        stats, schedule = samples.stats, str(sampler.schedule)
        price = stats.cost.saving, stats.seconds["total"], dict(stats.nfe)
        return cls(schedule, quality, difference, *price, exact)

    def to_json(self) -> dict:
        difference, exact = (part and part.to_json() for part in (self.difference, self.exact))
        return {**asdict(self), "quality": self.quality.to_json(), "difference": difference, "exact": exact}


@dataclass(frozen=True)
class Distance:
    """How MAUVE was taken: the embedder, how many real texts it is against, how many clusters, and the share of the
    texts' tokens (the embedder's) that lay behind the end of its context and were not read."""

    embedder: str
    num_reference: int
    num_clusters: int
    share_cut: float


@dataclass(frozen=True)
class Evaluation:
    """Rows of schedules by label, in the order given, and the quality of as much real text, if there was any.

    choose: the token choice. scorer: its name. distance: how MAUVE was taken. law_entropy: of the data's law, nats per
    token. None where there was none.
    """

    num_samples: int
    length: int
    reveal: str
    seed: int
    scorer: str | None
    rows: Mapping[str, Row]
    heldout: Quality | None
    choose: Categorical = field(default_factory=Categorical)
    distance: Distance | None = None
    law_entropy: float | None = None

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
    choose: Categorical | None = None,
    seed: int = 0,
    max_batch: int = 16,
    scorer: TextScorer | None = None,
    heldout_windows: np.ndarray | None = None,
    embedder: TextEmbedder | None = None,
    reference_windows: np.ndarray | None = None,
    log_law: Callable[[np.ndarray], np.ndarray] | None = None,
    law: np.ndarray | None = None,
    on_samples: Callable[[str, Samples], object] = lambda label, samples: None,
    follow: Follow = lambda phase, done, total: None,
) -> Evaluation:
    """Sample `num_samples` texts of `length` tokens with each schedule, and measure them.

    schedules: by label; the first is what others are compared with. choose: as `unmask.Sampler` takes it. scorer:
    scores the texts, decoded and in tokens of its own, or their ids. heldout_windows: real text, int64 [num_samples,
    length]. embedder: takes MAUVE against reference_windows, other real text, int64 [M, length]; best M = num_samples.
    log_law: log p [S] of token ids [S, L], where the data's law is known. law: the same as a table, float64
    [V] * length; then the law of each schedule is counted too, and compared exactly (see `unmask.study.law`, which has
    limits of size and policy). on_samples takes each schedule's samples when they are done, before any scoring;
    follow(phase, done, total) hears of progress.

    Raises:
        ValueError: a schedule that does not fit the models or the steps; fewer samples than an interval needs; windows
            of another shape; a scorer or embedder for models without a tokenizer, or an embedder without reference or
            scikit-learn; a law of another shape, or too large to count. Nothing has been sampled then.
    """
    samplers = _samplers(models, schedules, reveal, max_batch, choose)
    _check(samplers, num_samples, length, seed, scorer, heldout_windows)
    _check_embedder(samplers, length, embedder, reference_windows)
    exact = {} if law is None else _exact(samplers, length, law, log_law, follow)
    if exact and all(np.isfinite(one.nll) for one in exact.values()):
        log_law = _log_law_of(law)  # else a text may have no probability
    count, runs = _Count(follow, len(samplers) * num_samples * length), {}
    for label, sampler in samplers.items():
        runs[label] = sampler.sample(num_samples, length, seed=seed, progress=count)
        on_samples(label, runs[label])
    texts = {label: samples.tokens.numpy() for label, samples in runs.items()}
    if heldout_windows is not None:
        texts[REAL] = heldout_windows
    first, sampler = next(iter(samplers.items()))
    drawn = bootstrap.resamples(num_samples)
    scores = {} if scorer is None else _scores(scorer, texts, sampler.tokenizer, follow)
    columns = {label: columns_of(tokens, scores.get(label), log_law) for label, tokens in texts.items()}
    mauves, distance = {}, None
    if embedder is not None:
        mauves, distance = _mauves(embedder, texts, reference_windows, sampler.tokenizer, drawn, follow)
    qualities = {}
    for label, tokens in texts.items():
        quality = quality_of(tokens, columns[label], scores.get(label), drawn)
        qualities[label] = _with_mauve(quality, mauves[label].interval() if mauves else None)
    rows = {}
    for label, samples in runs.items():
        difference = None
        if label != first:
            difference = difference_of(columns[first], columns[label], drawn)
            difference = _with_mauve(difference, mauves[label].less(mauves[first]) if mauves else None)
        rows[label] = Row.of(samplers[label], samples, qualities[label], difference, exact.get(label))
    name = None if scorer is None else scorer.name
    real, entropy = qualities.get(REAL), None if law is None else Exact.of(law, law).nll
    return Evaluation(num_samples, length, str(reveal), seed, name, rows, real, sampler.choose, distance, entropy)


def _samplers(
    models: Mapping[str, Denoiser],
    schedules: Mapping[str, Schedule | str],
    reveal: Reveal,
    max_batch: int,
    choose: Categorical | None,
) -> dict[str, Sampler]:
    if not schedules:
        raise ValueError("schedules must hold at least one schedule, got none")
    options = {"reveal": reveal, "max_batch": max_batch, "choose": choose}
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
        sampler.check(length=length, seed=seed)
    if windows is not None and windows.shape != (num_samples, length):
        raise ValueError(f"heldout_windows must have shape {[num_samples, length]}, got {list(windows.shape)}")
    check_readable(scorer, next(iter(samplers.values())).tokenizer)


def _check_embedder(
    samplers: Mapping[str, Sampler], length: int, embedder: TextEmbedder | None, windows: np.ndarray | None
) -> None:
    if embedder is None:
        return
    check_installed()
    if next(iter(samplers.values())).tokenizer is None:
        raise ValueError("embedder needs text, and so models with a tokenizer, got none with one")
    if windows is None or windows.ndim != 2 or windows.shape[1] != length or len(windows) < MIN_UNITS:
        shape = None if windows is None else list(windows.shape)
        raise ValueError(
            f"reference_windows must be real texts [at least {MIN_UNITS}, {length}] for an embedder, got {shape}"
        )


def _exact(
    samplers: Mapping[str, Sampler],
    length: int,
    law: np.ndarray,
    log_law: Callable[[np.ndarray], np.ndarray] | None,
    follow: Follow,
) -> dict[str, Exact]:
    """The law of each schedule against that of the data."""
    one = next(iter(samplers.values()))
    shape = (next(iter(one.models.values())).spec.vocab_size,) * length
    if log_law is not None:
        raise ValueError("log_law must be left out where law tells the same, got both")
    if law.shape != shape:
        raise ValueError(f"law must have one axis of all ids for each token, {list(shape)}, got {list(law.shape)}")
    found = {}
    for label, sampler in samplers.items():
        output = output_law(sampler.models, sampler.schedule, sampler.reveal, length, sampler.choose)
        found[label] = Exact.of(output, law)
        follow("counting laws", len(found), len(samplers))
    return found


def _log_law_of(law: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def log_law(tokens: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(law[tuple(tokens.T)])

    return log_law


class _Count(Progress):
    """Tokens revealed, over the runs of all schedules."""

    def __init__(self, follow: Follow, total: int) -> None:
        self.follow, self.done, self.total = follow, 0, total

    def update(self, run: Run, tick: Tick) -> None:
        self.done += tick.num_revealed
        self.follow("sampling", self.done, self.total)


def _scores(
    scorer: TextScorer, texts: Mapping[str | None, np.ndarray], tokenizer: Tokenizer | None, follow: Follow
) -> dict[str | None, Scores]:
    on_text = _each("scoring", sum(map(len, texts.values())), follow)
    return {label: scores_of(scorer, tokens, tokenizer, on_text) for label, tokens in texts.items()}


def _mauves(
    embedder: TextEmbedder,
    texts: Mapping[str | None, np.ndarray],
    reference: np.ndarray,
    tokenizer: Tokenizer,
    drawn: np.ndarray,
    follow: Follow,
) -> tuple[dict[str | None, Mauve], Distance]:
    """MAUVE of each of `texts` against the same reference texts, which are drawn alike for all of them."""
    every = [*texts.values(), reference]
    on_text = _each("embedding", sum(map(len, every)), follow)
    found = [embedder.embed([decode(one, tokenizer) for one in tokens], on_text) for tokens in every]
    of_reference = found[-1].vectors
    drawn_reference = bootstrap.resamples(len(reference), len(drawn), seed=1)
    mauves = {
        label: Mauve.of(one.vectors, of_reference, drawn, drawn_reference)
        for label, one in zip(texts, found, strict=False)
    }
    cut, read = (sum(getattr(one, name).sum() for one in found) for name in ("num_cut", "num_tokens"))
    clusters = num_clusters(len(drawn[0]), len(reference))
    return mauves, Distance(embedder.name, len(reference), clusters, float(cut / (cut + read)))


def _each(phase: str, total: int, follow: Follow) -> Callable[[], None]:
    """What to call after each of `total` texts."""
    done = 0

    def on_text() -> None:
        nonlocal done
        done += 1
        follow(phase, done, total)

    return on_text


def _with_mauve(measured: Quality | Difference, mauve: Interval | None) -> Quality | Difference:
    if mauve is None:
        return measured
    return replace(measured, measures={**measured.measures, "mauve": mauve})
