"""Which schedule is best? Samples every placement of a list with one seed, measures the texts, and ranks them.

All schedules share their reveal times and noise (common random numbers), so they are compared text by text with the
first model alone. Where it is exact, a schedule starts from the texts of another one that agrees with it so far
(`unmask.study.replay`): 28 placements of two light segments of eight take about half of their network calls.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from unmask.choose import Categorical
from unmask.cost import Cost
from unmask.denoiser import Denoiser
from unmask.progress import Progress
from unmask.reveal import Reveal
from unmask.run import Run
from unmask.sampler import Sampler
from unmask.schedule import Schedule
from unmask.study.bootstrap import Interval
from unmask.study.identity import identity
from unmask.study.placements import Placement, check_segments
from unmask.study.prices import Prices
from unmask.study.quality import Columns, TextScorer, check_num_samples, check_readable, columns_of, scores_of
from unmask.study.ranking import EXACT, RATIO, Search, paired, ranked
from unmask.study.record import Finished, Record
from unmask.study.replay import Start, Texts, sample_from, start_of
from unmask.study.scorer import Scores
from unmask.study.search_progress import Watch
from unmask.timeline import Tick

MAX_SCHEDULES = 512
LogLaw = Callable[[np.ndarray], np.ndarray]


def search(
    models: Mapping[str, Denoiser],
    placements: Sequence[Placement],
    *,
    num_samples: int,
    length: int,
    reveal: Reveal,
    seed: int = 0,
    choose: Categorical | None = None,
    max_batch: int = 16,
    scorer: TextScorer | None = None,
    log_law: LogLaw | None = None,
    predict: Callable[[Schedule], Interval] | None = None,
    folder: Path | None = None,
    whole: bool = False,
    watch: Watch | None = None,
) -> Search:
    """Sample `num_samples` texts of `length` tokens with each placement, and rank them.

    models: by name; the first, alone at all steps, is what the others are compared with and always part of the study.
    placements: of equally many segments. scorer: ranks by perplexity; log_law: log p [S] of token ids [S, L], ranks by
    exact loss where the data's law is known. predict: extra loss of a schedule, as `Prediction.interval`. folder: where
    finished schedules are kept; what it holds of the same search is not done again, and what another scorer read there
    is read again but not sampled. whole: run every schedule from its
    first step, which takes longer and tells the seconds of each.

    Raises:
        ValueError: models that do not fit together, no way to rank, placements that do not fit, too many of them, a
            folder of another search; nothing has run then.
    """
    study = _Study(models, placements, num_samples, length, reveal, seed, choose or Categorical(), max_batch)
    study.check_ranking(scorer, log_law)
    watch, record = watch or Watch(), None
    if folder is not None:
        record = Record(folder, study.settings(), _told(scorer), study.steps, study.vocab_size, watch.tell)
    runs = _Runs(study, scorer, log_law, record, whole, watch)
    with watch:
        runs.run()
    return _found(study, runs, predict)


class _Study:
    """What is asked: checked, priced, and without a network call but those of `settings`."""

    def __init__(
        self,
        models: Mapping[str, Denoiser],
        placements: Sequence[Placement],
        num_samples: int,
        length: int,
        reveal: Reveal,
        seed: int,
        choose: Categorical,
        max_batch: int,
    ) -> None:
        self.models, self.num_samples, self.length, self.seed = dict(models), num_samples, length, seed
        self.reveal, self.choose, self.max_batch = reveal, choose, max_batch
        self.reference = next(iter(self.models), "")
        self.placements = self._with_first(placements)
        check_num_samples(num_samples)
        self.samplers = [self._sampler(one) for one in self.placements]
        self.samplers[0].check(length=length, seed=seed)
        check_segments(len(self.placements[0].models), reveal, length)
        self.prices = Prices(self.models, reveal, num_samples=num_samples, length=length, seed=seed)
        self.steps = self.prices.reveal_step
        self.steps_models = [self.prices.models_of(one.schedule) for one in self.placements]
        self.tokenizer = self.samplers[0].tokenizer
        self.vocab_size = self.models[self.reference].spec.vocab_size

    def _with_first(self, placements: Sequence[Placement]) -> list[Placement]:
        sizes = sorted({len(one.models) for one in placements})
        if len(sizes) != 1:
            raise ValueError(f"placements must be of equally many segments, got {sizes or 'none'}")
        found = list(dict.fromkeys([Placement((self.reference,) * sizes[0]), *placements]))
        if len(found) > MAX_SCHEDULES:
            raise ValueError(
                f"placements must be at most {MAX_SCHEDULES}, with the first model alone, got {len(found):,}; "
                "take fewer segments, or predict the best ones"
            )
        return found

    def _sampler(self, placement: Placement) -> Sampler:
        options = {"reveal": self.reveal, "choose": self.choose, "max_batch": self.max_batch}
        return Sampler(self.models, schedule=placement.schedule, **options)

    def check_ranking(self, scorer: TextScorer | None, log_law: LogLaw | None) -> None:
        if scorer is None and log_law is None:
            raise ValueError("scorer must be given to rank schedules, or the law of the data, got neither")
        check_readable(scorer, self.tokenizer)

    def settings(self) -> dict:
        """All that decides a schedule's texts; which schedules there are does not."""
        return {
            "models": {name: identity(model) for name, model in self.models.items()},
            "num_samples": self.num_samples,
            "length": self.length,
            "reveal": str(self.reveal),
            "seed": self.seed,
            "choose": asdict(self.choose),
        }


class _Runs:
    """The texts of every placement: from the record, or sampled, scored and recorded one after another."""

    def __init__(
        self,
        study: _Study,
        scorer: TextScorer | None,
        log_law: LogLaw | None,
        record: Record | None,
        whole: bool,
        watch: Watch,
    ) -> None:
        self.study, self.scorer, self.log_law, self.record, self.watch = study, scorer, log_law, record, watch
        self.finished: dict[int, Finished] = {}
        self.columns: dict[int, Columns] = {}
        for index, placement in enumerate(study.placements):
            known = None if record is None else record.load(str(placement))
            if known is not None and not (whole and known.texts.seconds is None):
                self.finished[index] = known
                if scorer is None or known.scores is not None:
                    self._measure(index)
        self.starts = self._plan(whole)

    def _plan(self, whole: bool) -> dict[int, tuple[int | None, Start]]:
        """For each placement that is to do: the placement that it starts from, which is done by then, and where."""
        study, done, starts = self.study, list(self.finished), {}
        for index in range(len(study.placements)):
            if index not in self.finished:
                earlier = [] if whole else [study.steps_models[one] for one in done]
                start = start_of(study.reveal, study.steps, study.steps_models[index], earlier)
                starts[index] = None if start.source is None else done[start.source], start
                done.append(index)
        return starts

    def run(self) -> None:
        study, watch = self.study, self.watch
        left = [index for index in range(len(study.placements)) if index not in self.columns]
        flops = sum(self._cost(index).total.total for index in self.starts)
        texts = 0 if self.scorer is None else len(left) * study.num_samples
        watch.start(len(study.placements), len(self.columns), {"sampling": flops, "scoring": texts})
        for index in left:
            schedule = str(study.placements[index])
            texts = self._sampled(index) if index in self.starts else self.finished[index].texts
            self.finished[index] = Finished(texts, self._scores(texts))
            self._measure(index)
            if self.record is not None:
                self.record.save(schedule, self.finished[index])
            watch.finish(schedule, self._news(index))

    def _sampled(self, index: int) -> Texts:
        source, start = self.starts[index]
        before, steps = None if source is None else self.finished[source].texts, self.study.steps
        calls = _Calls(self.study.prices, self.watch)
        return sample_from(self.study.samplers[index], start, before, steps, seed=self.study.seed, progress=calls)

    def _cost(self, index: int) -> Cost:
        start = self.starts[index][1]
        return self.study.prices.cost(self.study.placements[index].schedule, start.first_step)

    @property
    def calls_needed(self) -> float:
        """Network calls of the study, if nothing was recorded and nothing is run whole, by those of whole runs."""
        study, done, made = self.study, [], 0
        for models in study.steps_models:
            start = start_of(study.reveal, study.steps, models, done)
            made += study.prices.num_events(start.first_step)
            done.append(models)
        return made / (study.prices.num_events() * len(done))

    def _measure(self, index: int) -> None:
        finished = self.finished[index]
        tokens = finished.texts.tokens.astype(np.int64)
        self.columns[index] = columns_of(tokens, finished.scores, self.log_law)

    def _scores(self, texts: Texts) -> Scores | None:
        if self.scorer is None:
            return None
        tokens, on_text = texts.tokens.astype(np.int64), lambda: self.watch.advance("scoring", 1)
        return scores_of(self.scorer, tokens, self.study.tokenizer, on_text)

    def _news(self, index: int) -> str:
        first, here = ((self.columns[one].get("exact_nll") or self.columns[one].get("nll")) for one in (0, index))
        if first is None or here is None:
            return "finished"
        less = here[0].sum() / here[1].sum() - first[0].sum() / first[1].sum()
        return f"{less:+.3f} nats/token" if self.log_law is not None else f"perplexity × {math.exp(less):.3f}"


def _told(scorer: TextScorer | None) -> dict | None:
    """What tells a scorer from others."""
    if scorer is None:
        return None
    return {"name": scorer.name, "fingerprint": getattr(scorer, "fingerprint", None)}


class _Calls(Progress):
    """Tells a watch of the FLOPs of a run, tick by tick."""

    def __init__(self, prices: Prices, watch: Watch) -> None:
        self.prices, self.watch = prices, watch

    def update(self, run: Run, tick: Tick) -> None:
        name = list(self.prices.models)[tick.model]
        self.watch.advance("sampling", sum(self.prices.flops(name, rows) for rows in tick.row_counts.tolist()))


def _found(study: _Study, runs: _Runs, predict: Callable[[Schedule], Interval] | None) -> Search:
    scored = [(runs.finished[index], runs.columns[index]) for index in range(len(study.placements))]
    prices = Prices.typical(study.models, study.reveal, length=study.length, seed=study.seed)
    return Search(
        models=tuple(study.models),
        num_segments=len(study.placements[0].models),
        num_samples=study.num_samples,
        length=study.length,
        reveal=str(study.reveal),
        seed=study.seed,
        choose=study.choose,
        scorer=None if runs.scorer is None else runs.scorer.name,
        measure=RATIO if runs.log_law is None else EXACT,
        calls_needed=runs.calls_needed,
        rows=ranked(study.placements, scored, prices, predict),
        pairs=paired(study.placements, scored),
    )
