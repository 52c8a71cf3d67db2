"""The one loop: ticks → denoiser → hidden rows → `sample_head` → tokens."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask import memory
from unmask.choose import Categorical
from unmask.constraints import Constraints
from unmask.cost import Meter
from unmask.denoiser import Batch, Denoiser
from unmask.graphs import executors, upload
from unmask.kernels import HeadSample, Offsets, sample_head
from unmask.samples import Sample, Stats, decode
from unmask.slots import HandOut, Slots
from unmask.spans import SILENT, Spans
from unmask.tables import Bucket, LoadedTick, TickInputs, load, record
from unmask.timeline import Limits, Packing, Tick, Timeline
from unmask.workspace import Workspace


class Run(Iterator[Sample]):
    """One run of a sampler; iterate it for its samples as they finish.

    All buffers are allocated here and serve every tick: a slot of the timeline's `max_length` tokens for each resident
    sequence, and one workspace that all models share; when the run ends, in whatever way, they are let go.
    `on_tick(run, tick)` is called after each tick, `spans` at the begin of every part of the run, see `unmask.spans`.
    graphs: replay ticks as CUDA graphs; None: on a GPU. guidance: scale of classifier-free guidance, see `Sampler`.

    On a GPU the host runs ahead of the device: `on_tick` and `stats` count ticks that were launched, a network's NaN
    becomes an error when its sequence is handed out, and ticks and their tables go there a window at a time.
    `stats` tells what was done so far.
    """

    slots_type = Slots

    def __init__(
        self,
        denoisers: Mapping[str, Denoiser],
        timeline: Timeline,
        *,
        seed: int,
        choose: Categorical,
        constraints: Constraints | None = None,
        guidance: float = 0.0,
        tokenizer: Tokenizer | None = None,
        impl: str | None = None,
        graphs: bool | None = None,
        on_tick: Callable[["Run", Tick], object] | None = None,
        spans: Spans = SILENT,
    ) -> None:
        self.denoisers, self.timeline = dict(denoisers), timeline
        self._models = list(self.denoisers.values())
        self._seed, self._choose, self._impl, self._on_tick = seed, choose, impl, on_tick
        self._tokenizer, self._spans, self._guidance = tokenizer, spans, guidance
        self._device = self._models[0].device
        self._biases = {denoiser: drawable(denoiser, choose) for denoiser in self._models}
        self._lists = torch.from_numpy(constraints.bits).to(self._device) if constraints else None
        self._limits = timeline.limits
        self._executors = executors(self._models, self._limits, graphs, impl, spans)
        self._workspace = Workspace(requirements(self._models, self._limits), self._device)
        self._slots = self.slots_type(
            self._limits, self._device, keep_template=bool(guidance), keep_allowed=self._lists is not None
        )
        self._buffer_bytes = buffer_bytes(self._models, self._limits, self.slots_type)
        self._meter, self._num_finished, self._num_tokens = Meter(self.denoisers, 2 if guidance else 1), 0, 0
        self._packing = Packing(timeline.max_batch, timeline.num_models)
        self._seconds = {"plan": 0.0}
        self._model_seconds = [{"body": 0.0, "head": 0.0} for _ in self._models]
        self._started, self._stopped, self._failure = time.perf_counter(), None, None
        for denoiser in self._models:
            self._check_head(denoiser)
        self._samples = self._loop()

    def __next__(self) -> Sample:
        return next(self._samples)

    def close(self) -> None:
        """End the run before its time; `stats` then tells what was done."""
        self._samples.close()
        self._release()

    @property
    def stats(self) -> Stats:
        total = (self._stopped or time.perf_counter()) - self._started
        models = {name: dict(seconds) for name, seconds in zip(self.denoisers, self._model_seconds, strict=True)}
        for seconds, one in zip(models.values(), self._executors, strict=True):
            seconds["body"] += one.device_seconds
        phases = {phase: sum(seconds[phase] for seconds in models.values()) for phase in ("body", "head")}
        phases = {**self._seconds, **phases}
        return Stats(
            num_samples=self._num_finished,
            num_tokens=self._num_tokens,
            cost=self._meter.cost,
            num_ticks=self._packing.num_ticks,
            occupancy=self._packing.occupancy,
            seconds={"total": total, **phases, "other": max(0.0, total - sum(phases.values()))},
            model_seconds=models,
            peak_bytes=self._buffer_bytes + self.timeline.nbytes,
        )

    def tokens_of(self, slot: int, length: int) -> np.ndarray:
        """A copy of the int64 [length] tokens that stand in a slot now, mask ids where nothing is revealed yet."""
        start = slot * self._limits.max_length
        return self._slots.tokens[start : start + length].cpu().numpy().copy()

    def _release(self) -> None:
        """Let go of all buffers. What an exception's traceback still refers to goes with it."""
        for one in self._executors:
            one.close()
        self._stopped = self._stopped or time.perf_counter()
        self._workspace = self._slots = None

    def _loop(self) -> Iterator[Sample]:
        pending: deque[HandOut] = deque()
        try:
            for loaded in self._load():
                with self._spans("transfer"):
                    self._slots.admit(loaded)
                    self._slots.mask(loaded, self._models[0].spec.mask_id)
                self._run_tick(loaded)
                with self._spans("transfer"):
                    pending.extend(self._fetch(loaded))
                if self._on_tick is not None:
                    self._on_tick(self, self._tell(loaded.tick))
                while pending and pending[0].ready:
                    yield from self._hand_out(pending.popleft())
            for hand_out in pending:
                yield from self._hand_out(hand_out)
            if self._failure is not None:
                raise self._failure
        finally:
            self._release()

    def _load(self) -> Iterator[LoadedTick]:
        """The ticks with their integers on the device, a window at a time.

        An error in planning, such as a bad prompt, ends them and is kept: what was planned before it is done first.
        """
        ticks, window = iter(self.timeline), self._window
        while self._failure is None:
            with timed(self._seconds, "plan"), self._spans("plan"):
                taken = self._plan(ticks, window)
                loaded = load(taken, self._bucket, self._record, self._slots.length, self._upload)
            if not taken:
                return
            yield from loaded

    @property
    def _window(self) -> int:
        """How many ticks are planned and uploaded together."""
        return min(one.window for one in self._executors)

    def _plan(self, ticks: Iterator[Tick], window: int) -> list[Tick]:
        taken = []
        try:
            for tick in islice(ticks, window):
                taken.append(tick)
        except Exception as error:
            self._failure = error
        return taken

    def _upload(self, packed: np.ndarray) -> Tensor:
        with self._spans("transfer"):
            return upload(self._device, packed)

    def _bucket(self, tick: Tick) -> Bucket:
        return self._executors[tick.model].bucket(tick)

    def _record(self, tick: Tick, bucket: Bucket) -> np.ndarray:
        return record(tick, bucket, self._slots.length, self._slots.spare)

    def _run_tick(self, loaded: LoadedTick) -> None:
        tick = loaded.tick
        with memory.explained(tick, self._limits.max_batch):
            self._executors[tick.model].run(loaded.bucket, loaded.record, self._step)
        self._count(tick)

    def _count(self, tick: Tick) -> None:
        self._slots.note(tick)
        self._meter.add(tick)
        self._packing.add(tick)
        self._num_finished += int(tick.finished.sum())
        self._num_tokens += tick.num_revealed

    def _fetch(self, loaded: LoadedTick) -> Iterator[HandOut]:
        """What is complete after a tick."""
        if loaded.finished is not None:
            yield self._slots.fetch(loaded)

    def _tell(self, tick: Tick) -> Tick:
        """The tick as `on_tick` sees it: its rows are what was revealed."""
        return tick

    def _step(self, bucket: Bucket, inputs: TickInputs) -> None:
        """One tick on the device: the same work for all ticks of a bucket."""
        denoiser = self._models[bucket.model]
        with self._spans("transfer"):
            batch = self._batch(bucket, inputs)
            chunks = self._chunks(denoiser, batch, bucket, inputs)
        seconds = self._seconds_of(bucket.model)
        for part, hidden in self._timed_chunks(chunks, seconds):
            with timed(seconds, "head"), self._spans("head"):
                targets = inputs.targets[part]
                drawn = self._draw(denoiser, hidden, inputs.keys[part], targets, out=(self._slots.tokens, targets))
                self._slots.logprobs.index_copy_(0, targets, drawn.logprob.float())

    def _seconds_of(self, model: int) -> dict[str, float] | None:
        """Where the host's clock counts; None on a GPU, which it does not wait for."""
        return self._model_seconds[model] if self._device.type == "cpu" else None

    def _timed_chunks(
        self, chunks: Iterator[tuple[slice, Tensor]], seconds: dict[str, float] | None
    ) -> Iterator[tuple[slice, Tensor]]:
        while True:
            with timed(seconds, "body"), self._spans("body"):
                part, hidden = next(chunks, (None, None))
            if part is None:
                return
            yield part, hidden

    def _chunks(
        self, denoiser: Denoiser, batch: Batch, bucket: Bucket, inputs: TickInputs
    ) -> Iterator[tuple[slice, Tensor]]:
        """The hidden rows; with guidance, combined with those of the same call whose given positions are masked.

        The head is linear, so its logits are combined as the rows are, and no logits are stored.
        """
        if not self._guidance:
            yield from denoiser.chunks(batch, self._workspace)
            return
        template = torch.empty_like(batch.tokens)
        self._slots.gather(bucket, inputs, out=template, source=self._slots.template)
        mask_id = denoiser.spec.mask_id
        unguided = replace(batch, tokens=batch.tokens.masked_fill(template != mask_id, mask_id))
        others = denoiser.chunks(unguided, self._workspace)
        for part, hidden in denoiser.chunks(batch, self._workspace):
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True)  # the next call overwrites it
            _, other = next(others)
            yield part, wide.mul_(1 + self._guidance).sub_(other, alpha=self._guidance)

    def _draw(
        self,
        denoiser: Denoiser,
        hidden: Tensor,
        keys: Tensor,
        targets: Tensor,
        *,
        out: tuple[Tensor, Tensor] | None = None,
        want: tuple[str, ...] = ("logprob",),
        bias: Tensor | None = None,
        choose: Categorical | None = None,
        check: bool = True,
    ) -> HeadSample:
        """One token for each row; targets: the rows' places in the slots. check: look for rows without a finite law,
        on a CPU; a GPU would be waited for."""
        choose = self._choose if choose is None else choose
        return sample_head(
            hidden,
            denoiser.head.weight,
            self._biases[denoiser] if bias is None else bias,
            keys=keys,
            seed=self._seed,
            temperature=choose.temperature,
            top_k=choose.top_k,
            top_p=choose.top_p,
            allow=None if self._lists is None else self._lists[self._slots.allowed[targets]],
            out=out,
            want=want,
            check=check and self._device.type == "cpu",
            impl=self._impl,
        )

    def _check_head(self, denoiser: Denoiser) -> None:
        """Draw for no rows: what the head refuses, it refuses before the first network call."""
        weight = denoiser.head.weight
        num_columns, dtype = (denoiser.spec.vocab_size, None) if weight is None else (weight.shape[1], weight.dtype)
        if weight is not None and self._guidance:
            dtype = torch.promote_types(dtype, torch.float32)  # of combined rows
        hidden = torch.empty(0, num_columns, dtype=dtype, device=self._device)
        keys, targets = (torch.empty(*shape, dtype=torch.int64, device=self._device) for shape in ((0, 3), (0,)))
        self._draw(denoiser, hidden, keys, targets)

    def _batch(self, bucket: Bucket, inputs: TickInputs) -> Batch:
        """The tick's sequences back to back, copied out of their slots."""
        tokens = self._slots.gather(bucket, inputs, out=self._workspace.view("tick_tokens", bucket.num_tokens))
        lengths, row_counts, longest = bucket.lengths, bucket.row_counts, self._limits.max_length
        if lengths is None:
            lengths = Offsets(inputs.starts, longest)
        if row_counts is None:
            row_counts = Offsets(inputs.row_starts, min(longest, bucket.num_rows))
        return Batch(tokens, lengths, inputs.rows, row_counts, inputs.mask_rate, inputs.positions, self._spans)

    def _hand_out(self, hand_out: HandOut) -> Iterator[Sample]:
        masked = None if self._choose.draw_mask else self._models[0].spec.mask_id
        for index, tokens, logprobs, reveal_step in hand_out.finished(masked):
            with self._spans("decode"):
                text = decode(tokens, self._tokenizer)
            yield Sample(index, tokens, logprobs, reveal_step, text)


@contextmanager
def timed(seconds: dict[str, float] | None, name: str) -> Iterator[None]:
    """Adds the host's time to seconds[name]; None where another clock tells it."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if seconds is not None:
            seconds[name] += time.perf_counter() - started


def drawable(denoiser: Denoiser, choose: Categorical | None = None) -> Tensor:
    """The bias [V] of a denoiser's head, -inf for the ids that are never drawn; without `choose`, for the mask id."""
    head, spec = denoiser.head, denoiser.spec
    bias = torch.zeros(spec.vocab_size, device=denoiser.device) if head.bias is None else head.bias
    return without(bias, (spec.mask_id,) if choose is None else never_drawn(spec.mask_id, choose))


def never_drawn(mask_id: int, choose: Categorical) -> tuple[int, ...]:
    return choose.suppress if choose.draw_mask else (*choose.suppress, mask_id)


def without(bias: Tensor, ids: tuple[int, ...]) -> Tensor:
    """A copy of a bias, in fp32 at least, that is -inf for these ids."""
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return wide.index_fill(0, torch.tensor(ids, dtype=torch.int64, device=bias.device), -math.inf)


def requirements(denoisers: list[Denoiser], limits: Limits) -> list[dict[str, tuple[int, torch.dtype]]]:
    """What the ticks of a run ask of its workspace."""
    # A sequence may reveal all its positions in one event.
    size = limits.num_tokens, limits.num_tokens, limits.num_sequences
    return [{"tick_tokens": (limits.num_tokens, torch.int64)}, *(denoiser.buffers(*size) for denoiser in denoisers)]


def buffer_bytes(denoisers: list[Denoiser], limits: Limits, slots_type: type[Slots] = Slots) -> int:
    """Bytes of the workspace and the slots."""
    return Workspace(requirements(denoisers, limits), "meta").nbytes + slots_type.nbytes(limits)
