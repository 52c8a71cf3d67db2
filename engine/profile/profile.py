"""Samples once, and notes what happens."""

from copy import copy
from typing import Self

import torch

from unmask.profile.machine import MemoryWatch, ceiling
from unmask.profile.prefix import run_ticks
from unmask.profile.recorder import Recorder
from unmask.profile.result import Profile
from unmask.profile.trace import Both, Ranges
from unmask.progress import Progress
from unmask.run import Run
from unmask.sampler import Sampler
from unmask.samples import Sample
from unmask.schedule import Schedule
from unmask.spans import Spans
from unmask.timeline import Tick

WARM_UP = 3  # ticks


class Watch(Progress):
    """Keeps the integers of each tick and the samples, and passes everything on to another view.

    columns: a list with one number for each tick. `run`: None before the first tick. finished: whether all was done.
    """

    def __init__(self, view: Progress) -> None:
        self.view, self.run, self.finished = view, None, False
        self.columns: dict[str, list[int]] = {key: [] for key in ("model", "num_sequences", "num_rows", "num_tokens")}
        self.samples: list[Sample] = []

    def follow(self, sampler: Sampler, request: dict, spans: Spans) -> None:
        """Sample; a user who interrupts ends it with what was done until then, if that is anything."""
        try:
            sampler.sample(**request, progress=self, spans=spans)
            self.finished = True
        except KeyboardInterrupt:
            if self.run is None:
                raise

    def __enter__(self) -> Self:
        self.view.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.view.__exit__(*error)

    def start(self, num_samples: int, num_masked: int, models: list[str]) -> None:
        self.num_masked = num_masked // num_samples
        self.view.start(num_samples, num_masked, models)

    def update(self, run: Run, tick: Tick) -> None:
        self.run = run
        numbers = tick.model, len(tick.slots), len(tick.row_slot), int(tick.lengths.sum())
        for column, number in zip(self.columns.values(), numbers, strict=True):
            column.append(number)
        self.view.update(run, tick)

    def finish(self, sample: Sample) -> Sample:
        self.samples.append(sample)
        return self.view.finish(sample)


def profile(sampler: Sampler, request: dict, *, view: Progress | None = None) -> Profile:
    """The profile of a request, as `Sampler.sample` takes it and with the same samples, all of one length and prompt.

    view: what the user sees meanwhile. Where ticks are replayed as CUDA graphs, whose inside no clock sees, the same
    ticks run again without graphs, and the seconds of the first run's are divided as theirs. On a GPU there are NVTX
    ranges.

    A run that is interrupted gives the profile of what was done, as `partial`; before the first tick it is a
    KeyboardInterrupt.
    """
    first = next(iter(sampler.models.values()))
    on_gpu, graphs = first.device.type == "cuda", has_graphs(sampler)
    watch, memory = Watch(view or Progress()), MemoryWatch(first.device)
    recorder = spans = Recorder(first.device, inside=not graphs)
    if on_gpu:
        spans = Both(recorder, Ranges(list(sampler.models), torch.cuda.nvtx.range))
    watch.follow(sampler, request, spans)
    host = times = recorder.times()
    high_water = memory.read()
    divided = graphs and watch.finished
    if divided:
        again, eager, inside = Watch(Progress()), copy(sampler), Recorder(first.device)
        eager.graphs = False
        again.follow(eager, request, inside)
        divided = again.finished
        times = inside.times().placed_in(times) if divided else times
    weight = first.head.weight
    dtype = torch.float32 if weight is None else weight.dtype
    return Profile(
        sampler,
        request,
        dtype,
        watch.run.stats,
        watch.columns,
        sorted(watch.samples, key=lambda sample: sample.index),
        watch.num_masked,
        times,
        host,
        ceiling(first.device, dtype),
        high_water,
        partial=not watch.finished,
        divided=divided,
    )


def warm_up(sampler: Sampler, request: dict) -> None:
    """A few ticks with each model, so that nothing of a profile is done for the first time."""
    for name in sampler.models:
        alone = copy(sampler)
        alone.schedule = Schedule.single(name)
        run_ticks(alone, WARM_UP, request)


def has_graphs(sampler: Sampler) -> bool:
    """Whether any model's ticks are replayed as CUDA graphs."""
    if sampler.graphs is False or sampler.impl == "reference":
        return False
    return any(model.device.type == "cuda" and model.capturable for model in sampler.models.values())
