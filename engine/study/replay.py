"""Sampling a schedule from the texts of another one.

With `Ancestral` the step that reveals a position, the position's noise and the mask rate of the step depend on the
seed, the text's index and the position alone. So two schedules that give a text's events to the same models up to
some step have the same tokens until there, and the texts of one are a checkpoint for the other: mask the positions
that were revealed from that step on, and fill these gaps as in any infilling. Nothing else of a run is carried from
step to step, and the result has the bits of a whole run.

The other policies count or order the positions that are masked in the template; with a part of them given, their steps
are others, and their schedules run whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmask.progress import Progress
from unmask.reveal import Ancestral, Reveal
from unmask.sampler import Sampler


@dataclass(frozen=True, eq=False)
class Texts:
    """All samples of a schedule. tokens: int32 [num_samples, length]. logprobs: float32, of the same shape.
    seconds: of sampling them, None where not all of it was done."""

    tokens: np.ndarray
    logprobs: np.ndarray
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Start:
    """Where a schedule's run begins. source: which of the earlier schedules has the tokens before, None for a run from
    the beginning. first_step: int64 [num_samples], the first step that each text still needs."""

    source: int | None
    first_step: np.ndarray


def start_of(reveal: Reveal, steps: np.ndarray, models: np.ndarray, earlier: Sequence[np.ndarray]) -> Start:
    """The start that leaves the least to do.

    steps: int [num_samples, length], the reveal steps of all schedules. models: int64 [num_steps], each step's model;
    earlier: those of schedules that are done by then.
    """
    whole = Start(None, np.zeros(len(steps), np.int64))
    if not isinstance(reveal, Ancestral) or not earlier:
        return whole
    shared = [_first(models != other) for other in earlier]
    source = int(np.argmax(shared))
    differs = (models != earlier[source])[steps]
    first = np.where(differs, steps, len(models)).min(1)
    # A text in which no event differs is no request, as nothing of it is masked: its last event is done again.
    return Start(source, np.minimum(first, steps.max(1)).astype(np.int64))


def sample_from(
    sampler: Sampler, start: Start, source: Texts | None, steps: np.ndarray, *, seed: int, progress: Progress
) -> Texts:
    """The texts of `sampler`'s schedule, of which `source` has what was revealed before `start`."""
    num, length = steps.shape
    kept = steps < start.first_step[:, None]
    prompt = None if source is None else np.where(kept, source.tokens, sampler.mask_id)
    samples = sampler.sample(num, length, seed=seed, prompt=prompt, progress=progress)
    revealed = samples.reveal_step.numpy()
    if not np.array_equal(revealed, np.where(kept, -1, steps)):
        raise RuntimeError("a run did not keep to its reveal plan")
    tokens, logprobs = samples.tokens.numpy().astype(np.int32), samples.logprobs.numpy()
    if source is None:
        return Texts(tokens, logprobs, samples.stats.seconds["total"])
    return Texts(tokens, np.where(kept, source.logprobs, logprobs), None)


def _first(differs: np.ndarray) -> int:
    return int(differs.argmax()) if differs.any() else len(differs)
