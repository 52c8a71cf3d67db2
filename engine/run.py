"""The one loop: ticks → denoiser → hidden rows → `sample_head` → tokens."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.choose import Categorical
from unmask.cost import Meter
from unmask.denoiser import Batch, Denoiser
from unmask.kernels import HeadSample, sample_head
from unmask.samples import Sample, Stats, decode
from unmask.timeline import Tick, Timeline
from unmask.workspace import Workspace

PHASES = ("plan", "body", "head", "other")


class Run(Iterator[Sample]):
    """One run of a sampler; iterate it for its samples as they finish.

    All buffers are allocated here and serve every tick: a slot of the timeline's `max_length` tokens for each resident
    sequence, and one workspace that all models share. `on_tick(run, tick)` is called after each tick.

    `stats` tells what was done so far.
    """

    def __init__(
        self,
        denoisers: Mapping[str, Denoiser],
        timeline: Timeline,
        *,
        seed: int,
        choose: Categorical,
        tokenizer: Tokenizer | None = None,
        impl: str | None = None,
        on_tick: Callable[["Run", Tick], object] | None = None,
    ) -> None:
        self.denoisers, self.timeline = dict(denoisers), timeline
        self._models = list(self.denoisers.values())
        self._seed, self._choose, self._impl, self._on_tick = seed, choose, impl, on_tick
        self._tokenizer = tokenizer
        first = self._models[0]
        self._device = first.device
        self._biases = {denoiser: drawable(denoiser) for denoiser in self._models}
        slots, length = timeline.max_resident, timeline.max_length
        self._workspace = Workspace(requirements(self._models, timeline), self._device)
        self._tokens = torch.empty(slots, length, dtype=torch.int64, device=self._device)
        self._logprobs = torch.empty(slots, length, device=self._device)
        self._reveal_step = np.empty((slots, length), np.int32)
        self._meter, self._num_finished = Meter(self.denoisers), 0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._model_seconds = {name: {"body": 0.0, "head": 0.0} for name in self.denoisers}
        self._started, self._stopped = time.perf_counter(), None
        for denoiser in self._models:
            self._check_head(denoiser)
        self._samples = self._loop()

    def __next__(self) -> Sample:
        return next(self._samples)

    def close(self) -> None:
        """End the run before its time; `stats` then tells what was done."""
        self._samples.close()
        self._stopped = self._stopped or time.perf_counter()

    @property
    def stats(self) -> Stats:
        total = (self._stopped or time.perf_counter()) - self._started
        phases = {**self._seconds, "other": total - sum(self._seconds.values())}
        return Stats(
            num_samples=self._num_finished,
            cost=self._meter.cost,
            num_ticks=self.timeline.stats.num_ticks,
            occupancy=self.timeline.stats.occupancy,
            seconds={"total": total, **phases},
            model_seconds={name: dict(phases) for name, phases in self._model_seconds.items()},
            peak_bytes=self._workspace.nbytes + state_bytes(self.timeline),
        )

    def tokens_of(self, slot: int, length: int) -> np.ndarray:
        """A copy of the int64 [length] tokens that stand in a slot now, mask ids where nothing is revealed yet."""
        return self._tokens[slot, :length].cpu().numpy().copy()

    def _loop(self) -> Iterator[Sample]:
        try:
            ticks = iter(self.timeline)
            while True:
                with self._phase("plan"):
                    tick = next(ticks, None)
                if tick is None:
                    return
                self._admit(tick)
                self._run_tick(tick)
                self._num_finished += int(tick.finished.sum())
                if self._on_tick is not None:
                    self._on_tick(self, tick)
                yield from self._finished(tick)
        finally:
            self._stopped = time.perf_counter()

    def _admit(self, tick: Tick) -> None:
        for slots, planned, _ in tick.admitted:
            rows = torch.from_numpy(slots.astype(np.int64)).to(self._device)
            self._tokens[rows, : planned.length] = torch.from_numpy(planned.template).to(self._device)
            self._logprobs[rows] = 0.0
            self._reveal_step[slots] = -1

    def _run_tick(self, tick: Tick) -> None:
        denoiser, length = self._models[tick.model], self._tokens.shape[1]
        targets = tick.row_slot.astype(np.int64) * length + tick.row_position
        keys = np.stack([np.repeat(tick.sequences, tick.row_counts), tick.row_position, np.zeros_like(targets)], 1)
        targets, keys = (torch.from_numpy(part).to(self._device) for part in (targets, keys))
        batch = self._batch(tick)
        chunks = denoiser.chunks(batch, self._workspace)
        seconds = list(self._model_seconds.values())[tick.model]
        while True:
            with self._phase("body", seconds):
                part, hidden = next(chunks, (None, None))
            if part is None:
                break
            with self._phase("head", seconds):
                drawn = self._draw(denoiser, hidden, keys[part], targets[part])
                self._logprobs.view(-1)[targets[part]] = drawn.logprob.float()
        self._reveal_step[tick.row_slot, tick.row_position] = np.repeat(tick.steps, tick.row_counts)
        self._meter.add(tick)

    def _draw(self, denoiser: Denoiser, hidden: Tensor, keys: Tensor, targets: Tensor) -> HeadSample:
        return sample_head(
            hidden,
            denoiser.head.weight,
            self._biases[denoiser],
            keys=keys,
            seed=self._seed,
            temperature=self._choose.temperature,
            top_k=self._choose.top_k,
            top_p=self._choose.top_p,
            out=(self._tokens, targets),
            want=("logprob",),
            impl=self._impl,
        )

    def _check_head(self, denoiser: Denoiser) -> None:
        """Draw for no rows: what the head refuses, it refuses before the first network call."""
        weight = denoiser.head.weight
        num_columns, dtype = (denoiser.spec.vocab_size, None) if weight is None else (weight.shape[1], weight.dtype)
        hidden = torch.empty(0, num_columns, dtype=dtype, device=self._device)
        keys, targets = (torch.empty(*shape, dtype=torch.int64, device=self._device) for shape in ((0, 3), (0,)))
        self._draw(denoiser, hidden, keys, targets)

    def _batch(self, tick: Tick) -> Batch:
        """The tick's sequences back to back, copied out of their slots."""
        lengths = tick.lengths.astype(np.int64)
        starts = lengths.cumsum() - lengths
        inside = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        source = np.repeat(tick.slots * np.int64(self._tokens.shape[1]), lengths) + inside
        tokens = self._workspace.view("tick_tokens", len(source))
        torch.index_select(self._tokens.view(-1), 0, torch.from_numpy(source).to(self._device), out=tokens)
        rows = np.repeat(starts, tick.row_counts) + tick.row_position
        return Batch(
            tokens=tokens,
            lengths=tuple(lengths.tolist()),
            rows=torch.from_numpy(rows).to(self._device),
            row_counts=tuple(tick.row_counts.tolist()),
            mask_rate=torch.from_numpy(tick.mask_rate).to(self._device),
        )

    def _finished(self, tick: Tick) -> Iterator[Sample]:
        """The samples that this tick completed, copied off the device together and cut apart without further copies."""
        at = np.flatnonzero(tick.finished)
        if not at.size:
            return
        slots, lengths = torch.from_numpy(tick.slots[at].astype(np.int64)), tick.lengths[at]
        inside = torch.from_numpy(np.arange(self._tokens.shape[1]) < lengths[:, None])
        on_device = slots.to(self._device)
        written = self._tokens[on_device], self._logprobs[on_device], torch.from_numpy(self._reveal_step)[slots]
        columns = (rows.cpu()[inside].split(lengths.tolist()) for rows in written)
        for index, tokens, logprobs, reveal_step in zip(tick.sequences[at].tolist(), *columns, strict=True):
            yield Sample(index, tokens, logprobs, reveal_step, decode(tokens, self._tokenizer))

    @contextmanager
    def _phase(self, name: str, *also: dict[str, float]) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            for seconds in (self._seconds, *also):
                seconds[name] += passed


def drawable(denoiser: Denoiser) -> Tensor:
    """The bias [V] of a denoiser's head, -inf for the mask id, which is never drawn."""
    head, spec = denoiser.head, denoiser.spec
    bias = torch.zeros(spec.vocab_size, device=denoiser.device) if head.bias is None else head.bias
    mask = torch.tensor([spec.mask_id], device=denoiser.device)
    return bias.to(torch.promote_types(bias.dtype, torch.float32)).index_fill(0, mask, -math.inf)


def requirements(denoisers: list[Denoiser], timeline: Timeline) -> list[dict[str, tuple[int, torch.dtype]]]:
    """What the ticks of a run ask of its workspace."""
    max_batch = min(timeline.max_batch, timeline.max_resident)
    max_tokens = max_batch * timeline.max_length
    # A sequence may reveal all its positions in one event.
    models = [denoiser.buffers(max_tokens, max_tokens, max_batch) for denoiser in denoisers]
    return [{"tick_tokens": (max_tokens, torch.int64)}, *models]


def state_bytes(timeline: Timeline) -> int:
    """Bytes of the resident sequences: tokens, log-probabilities and reveal steps, and the timeline's tables."""
    return timeline.max_resident * timeline.max_length * (8 + 4 + 4) + timeline.nbytes
