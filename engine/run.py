"""The one loop: ticks → denoiser → hidden rows → `sample_head` → tokens."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask import memory
from unmask.choose import Categorical
from unmask.cost import Meter
from unmask.denoiser import Batch, Denoiser
from unmask.graphs import Fetched, executor, upload
from unmask.kernels import HeadSample, NonFiniteLogits, Offsets, sample_head
from unmask.samples import Sample, Stats, decode
from unmask.tables import Bucket, Parcel, TickInputs, read_array, record
from unmask.timeline import Limits, Packing, Tick, Timeline
from unmask.workspace import Workspace

PHASES = ("plan", "body", "head", "other")


class _Loaded(NamedTuple):
    """A tick whose integers are on the device."""

    tick: Tick
    bucket: Bucket
    record: Tensor  # uint8, see `tables`
    admitted: list[tuple[Tensor, Tensor]]  # slots [A] and the template [L] to write into them first
    finished: Tensor | None  # int64 [F], slots to hand out afterwards


class _HandOut(NamedTuple):
    """Finished sequences on their way to the host."""

    sequences: list[int]
    lengths: list[int]
    reveal_step: Tensor  # int32 [F, longest]
    fetched: Fetched  # tokens int64, log-probabilities float32 [F, longest]


class Run(Iterator[Sample]):
    """One run of a sampler; iterate it for its samples as they finish.

    All buffers are allocated here and serve every tick: a slot of the timeline's `max_length` tokens for each resident
    sequence, and one workspace that all models share; when the run ends, in whatever way, they are let go.
    `on_tick(run, tick)` is called after each tick. graphs: replay ticks as CUDA graphs; None: on a GPU.

    On a GPU the host runs ahead of the device: `on_tick` and `stats` count ticks that were launched, a network's NaN
    becomes an error when its sequence is handed out, and ticks and their tables go there a window at a time.
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
        graphs: bool | None = None,
        on_tick: Callable[["Run", Tick], object] | None = None,
    ) -> None:
        self.denoisers, self.timeline = dict(denoisers), timeline
        self._models = list(self.denoisers.values())
        self._seed, self._choose, self._impl, self._on_tick = seed, choose, impl, on_tick
        self._tokenizer = tokenizer
        self._device = self._models[0].device
        self._biases = {denoiser: drawable(denoiser) for denoiser in self._models}
        self._limits = timeline.limits
        self._executors = [executor(denoiser, self._limits, graphs) for denoiser in self._models]
        self._allocate()
        self._meter, self._num_finished = Meter(self.denoisers), 0
        self._packing = Packing(timeline.max_batch, timeline.num_models)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._started, self._stopped = time.perf_counter(), None
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
        phases = dict(self._seconds)
        phases["body"] += sum(one.device_seconds for one in self._executors)
        phases["other"] = max(0.0, total - sum(phases.values()))
        return Stats(
            num_samples=self._num_finished,
            cost=self._meter.cost,
            num_ticks=self._packing.num_ticks,
            occupancy=self._packing.occupancy,
            seconds={"total": total, **phases},
            peak_bytes=self._peak_bytes,
        )

    def tokens_of(self, slot: int, length: int) -> np.ndarray:
        """A copy of the int64 [length] tokens that stand in a slot now, mask ids where nothing is revealed yet."""
        return self._slots[slot, :length].cpu().numpy().copy()

    def _allocate(self) -> None:
        slots, length = self._limits.max_resident, self._limits.max_length
        self._workspace = Workspace(requirements(self._models, self._limits), self._device)
        # One place more than the slots have, which unused places of a padded tick read and write.
        self._tokens = torch.zeros(slots * length + 1, dtype=torch.int64, device=self._device)
        self._logprobs = torch.zeros(slots * length + 1, device=self._device)
        self._slots, self._slot_logprobs = (flat[:-1].view(slots, length) for flat in (self._tokens, self._logprobs))
        self._reveal_step = np.empty((slots, length), np.int32)
        self._peak_bytes = buffer_bytes(self._models, self._limits) + self.timeline.nbytes

    def _release(self) -> None:
        """Let go of all buffers. What an exception's traceback still refers to goes with it."""
        for one in self._executors:
            one.close()
        self._stopped = self._stopped or time.perf_counter()
        self._workspace = self._tokens = self._logprobs = self._slots = self._slot_logprobs = self._reveal_step = None

    def _loop(self) -> Iterator[Sample]:
        pending: deque[_HandOut] = deque()
        try:
            for loaded in self._load():
                self._admit(loaded)
                self._run_tick(loaded)
                if loaded.finished is not None:
                    pending.append(self._finish(loaded))
                if self._on_tick is not None:
                    self._on_tick(self, loaded.tick)
                while pending and pending[0].fetched.ready:
                    yield from self._hand_out(pending.popleft())
            for hand_out in pending:
                yield from self._hand_out(hand_out)
        finally:
            self._release()

    def _load(self) -> Iterator[_Loaded]:
        """The ticks with their integers on the device, a window at a time: one copy for all of its tables."""
        ticks, window = iter(self.timeline), min(one.window for one in self._executors)
        while True:
            with self._phase("plan"):
                taken = list(islice(ticks, window))
                loaded = self._upload(taken)
            if not taken:
                return
            yield from loaded

    def _upload(self, ticks: list[Tick]) -> list[_Loaded]:
        parcel, fields, length = Parcel(), [], self._limits.max_length
        spare = len(self._tokens) - 1
        for tick in ticks:
            bucket = self._executors[tick.model].bucket(tick)
            admitted = [(slots.astype(np.int64), planned.template) for slots, planned, _ in tick.admitted]
            finished = tick.slots[tick.finished].astype(np.int64)
            fields.append(
                (
                    tick,
                    bucket,
                    parcel.add(record(tick, bucket, length, spare)),
                    [tuple(map(parcel.add, arrays)) for arrays in admitted],
                    parcel.add(finished) if len(finished) else None,
                )
            )
        buffer = upload(parcel.packed(), self._device)

        def arrived(field: tuple | None) -> Tensor | None:
            return None if field is None else read_array(buffer, *field)

        return [
            _Loaded(tick, bucket, arrived(row), [tuple(map(arrived, pair)) for pair in admitted], arrived(finished))
            for tick, bucket, row, admitted, finished in fields
        ]

    def _admit(self, loaded: _Loaded) -> None:
        for slots, template in loaded.admitted:
            self._slots[:, : len(template)].index_copy_(0, slots, template.expand(len(slots), -1))
            self._slot_logprobs.index_fill_(0, slots, 0.0)
        for slots, _, _ in loaded.tick.admitted:
            self._reveal_step[slots] = -1

    def _run_tick(self, loaded: _Loaded) -> None:
        tick = loaded.tick
        with memory.explained(tick, self._limits.max_batch):
            self._executors[tick.model].run(loaded.bucket, loaded.record, self._step)
        self._reveal_step[tick.row_slot, tick.row_position] = np.repeat(tick.steps, tick.row_counts)
        self._meter.add(tick)
        self._packing.add(tick)
        self._num_finished += int(tick.finished.sum())

    def _step(self, bucket: Bucket, inputs: TickInputs) -> None:
        """One tick on the device: the same work for all ticks of a bucket."""
        denoiser = self._models[bucket.model]
        batch = self._batch(bucket, inputs)
        chunks = denoiser.chunks(batch, self._workspace)
        while True:
            with self._phase("body", of_host=True):
                part, hidden = next(chunks, (None, None))
            if part is None:
                break
            with self._phase("head", of_host=True):
                drawn = self._draw(denoiser, hidden, inputs.keys[part], inputs.targets[part])
                self._logprobs.index_copy_(0, inputs.targets[part], drawn.logprob.float())

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
            check=self._device.type == "cpu",  # a GPU would be waited for
            impl=self._impl,
        )

    def _check_head(self, denoiser: Denoiser) -> None:
        """Draw for no rows: what the head refuses, it refuses before the first network call."""
        weight = denoiser.head.weight
        num_columns, dtype = (denoiser.spec.vocab_size, None) if weight is None else (weight.shape[1], weight.dtype)
        hidden = torch.empty(0, num_columns, dtype=dtype, device=self._device)
        keys, targets = (torch.empty(*shape, dtype=torch.int64, device=self._device) for shape in ((0, 3), (0,)))
        self._draw(denoiser, hidden, keys, targets)

    def _batch(self, bucket: Bucket, inputs: TickInputs) -> Batch:
        """The tick's sequences back to back, copied out of their slots."""
        longest = self._limits.max_length
        tokens = self._workspace.view("tick_tokens", bucket.num_tokens)
        if bucket.lengths == (longest,) * bucket.num_sequences:
            torch.index_select(self._slots, 0, inputs.slots, out=tokens.view(bucket.num_sequences, longest))
        else:
            torch.index_select(self._tokens, 0, self._source(bucket, inputs), out=tokens)
        offsets = Offsets(inputs.starts, longest), Offsets(inputs.row_starts, min(longest, bucket.num_rows))
        lengths, row_counts = (
            offset if known is None else known
            for known, offset in zip((bucket.lengths, bucket.row_counts), offsets, strict=True)
        )
        return Batch(tokens, lengths, inputs.rows, row_counts, inputs.mask_rate, inputs.positions)

    def _source(self, bucket: Bucket, inputs: TickInputs) -> Tensor:
        """int64 [T]: where each token of the tick stands in `_tokens`; the spare place for those that are unused."""
        place = torch.arange(bucket.num_tokens, dtype=torch.int32, device=self._device)
        owner = torch.bucketize(place, inputs.starts[1:], right=True).clamp_(max=bucket.num_sequences - 1)
        source = inputs.slots[owner] * self._limits.max_length + (place - inputs.starts[owner])
        return torch.where(place < inputs.starts[-1], source, len(self._tokens) - 1)

    def _finish(self, loaded: _Loaded) -> _HandOut:
        """Start to fetch what this tick completed; its slots may be written again by the next."""
        at = loaded.tick.finished
        written = tuple(state.index_select(0, loaded.finished) for state in (self._slots, self._slot_logprobs))
        return _HandOut(
            loaded.tick.sequences[at].tolist(),
            loaded.tick.lengths[at].tolist(),
            torch.from_numpy(self._reveal_step[loaded.tick.slots[at]]),
            Fetched(written),
        )

    def _hand_out(self, hand_out: _HandOut) -> Iterator[Sample]:
        """Samples, cut out of what was fetched without further copies."""
        columns = *hand_out.fetched.wait(), hand_out.reveal_step
        for row, (index, length) in enumerate(zip(hand_out.sequences, hand_out.lengths, strict=True)):
            tokens, logprobs, reveal_step = (column[row, :length] for column in columns)
            self._check_revealed(index, tokens)
            yield Sample(index, tokens, logprobs, reveal_step, decode(tokens, self._tokenizer))

    def _check_revealed(self, index: int, tokens: Tensor) -> None:
        """A row without a finite law is left masked by a head that does not wait to look."""
        masked = (tokens == self._models[0].spec.mask_id).nonzero()
        if len(masked):
            raise NonFiniteLogits(
                f"sequence {index}, position {int(masked[0])}: a logit was NaN or +inf, or no id was possible"
            )

    @contextmanager
    def _phase(self, name: str, of_host: bool = False) -> Iterator[None]:
        """Counts the host's seconds; `of_host`: only where the work is the host's own."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if not of_host or self._device.type == "cpu":
                self._seconds[name] += time.perf_counter() - started


def drawable(denoiser: Denoiser) -> Tensor:
    """The bias [V] of a denoiser's head, -inf for the mask id, which is never drawn."""
    head, spec = denoiser.head, denoiser.spec
    bias = torch.zeros(spec.vocab_size, device=denoiser.device) if head.bias is None else head.bias
    mask = torch.tensor([spec.mask_id], device=denoiser.device)
    return bias.to(torch.promote_types(bias.dtype, torch.float32)).index_fill(0, mask, -math.inf)


def requirements(denoisers: list[Denoiser], limits: Limits) -> list[dict[str, tuple[int, torch.dtype]]]:
    """What the ticks of a run ask of its workspace."""
    # A sequence may reveal all its positions in one event.
    size = limits.num_tokens, limits.num_tokens, limits.num_sequences
    return [{"tick_tokens": (limits.num_tokens, torch.int64)}, *(denoiser.buffers(*size) for denoiser in denoisers)]


def buffer_bytes(denoisers: list[Denoiser], limits: Limits) -> int:
    """Bytes of the workspace, and of the tokens, log-probabilities and reveal steps of the resident sequences."""
    state = limits.max_resident * limits.max_length * (8 + 4 + 4) + (8 + 4)
    return Workspace(requirements(denoisers, limits), "meta").nbytes + state
