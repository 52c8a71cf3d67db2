"""The loop of adaptive policies: candidates → denoiser → hidden rows → `sample_head` → some keep their token."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.candidates import Candidates, Packed
from unmask.denoiser import Batch, Denoiser
from unmask.kernels import Offsets
from unmask.rounds import Round, Rounds
from unmask.run import Run, timed
from unmask.samples import Sample
from unmask.slots import HandOut, Slots
from unmask.tables import Field, LoadedTick, blank, fields_of, read, rounded
from unmask.timeline import Limits, Tick


class AdaptiveBucket(NamedTuple):
    """The shape of a network call, as `Bucket`. num_rows None: as many as there are candidates, which the host counts.
    longest: no sequence has more of them, where num_rows is given."""

    model: int
    num_sequences: int
    num_tokens: int
    num_rows: int | None
    longest: int
    lengths: tuple[int, ...] | None

    def read(self, record: Tensor) -> "AdaptiveInputs":
        return AdaptiveInputs(**read(record, layout(self)))


class AdaptiveInputs(NamedTuple):
    """A record's fields on the device, for B sequences.

    slots int64 [B]; starts int32 [B + 1]; sequences, steps int64 [B], of the noise; ends, counts int64 [B], see
    `Trajectory`; num_masked int64 [B]. An unused place has no window: its end is 0.
    """

    slots: Tensor
    starts: Tensor
    sequences: Tensor
    steps: Tensor
    ends: Tensor
    counts: Tensor
    num_masked: Tensor


class AdaptiveSlots(Slots):
    """Slots whose reveal steps live on the device, where it is decided. window_start, window_end: int32, for a masked
    position, where its window begins and ends; all flat. num_left: int64 [slots + 1], masked positions of each
    sequence, the last for nobody."""

    def __init__(self, limits: Limits, device: torch.device, **keep: bool) -> None:
        super().__init__(limits, device, **keep)
        self.reveal_step = torch.full_like(self.tokens, -1, dtype=torch.int32)
        self.window_start, self.window_end = torch.zeros_like(self.reveal_step), torch.zeros_like(self.reveal_step)
        self.num_left = torch.zeros(limits.max_resident + 1, dtype=torch.int64, device=device)

    @staticmethod
    def nbytes(limits: Limits) -> int:
        return Slots.nbytes(limits) + (limits.max_resident * limits.max_length + 1) * 2 * 4

    def _reset_steps(self, loaded: LoadedTick) -> None:
        (reveal_step,) = self._rows(self.reveal_step)
        for slots, _ in loaded.admitted:
            reveal_step.index_fill_(0, slots, -1)

    def note(self, tick: Tick) -> None:
        """The device does."""

    def take(self, slots: Tensor, sequences: list[int], lengths: list[int]) -> HandOut:
        """Start to fetch the sequences in slots int64 [F]."""
        columns = self._rows(self.tokens, self.logprobs, self.reveal_step)
        return HandOut(sequences, lengths, *(rows.index_select(0, slots) for rows in columns))

    def fetch(self, loaded: LoadedTick) -> HandOut:
        tick, done = loaded.tick, loaded.tick.finished
        return self.take(loaded.finished, tick.sequences[done].tolist(), tick.lengths[done].tolist())


class Drawn(NamedTuple):
    """What a step drew for R candidates: token int64, its log-probability fp32, its score fp32 where they compete, and
    the entropy of its law where a bound on it decides."""

    token: Tensor
    logprob: Tensor
    score: Tensor | None = None
    entropy: Tensor | None = None


class AdaptiveRun(Run):
    """One run of an adaptive policy; arguments as of `Run`. policy: how a step chooses.

    A policy's own class finds the candidates of a tick in `_step`, has `_advance` draw for them, scores what was drawn
    in `_score`, and says in `_choose_rows` who keeps it.
    """

    slots_type = AdaptiveSlots
    timeline: Rounds

    def __init__(self, denoisers: Mapping[str, Denoiser], timeline: Rounds, *, policy: object, **options) -> None:
        self._policy = policy
        self._num_rows: Tensor | None = None
        self._revealed: tuple[Tensor, Tensor] | None = None
        super().__init__(denoisers, timeline, **options)

    def _bucket(self, tick: Round) -> AdaptiveBucket:
        executor = self._executors[tick.model]
        lengths = tuple(tick.lengths.tolist())
        if not executor.padded:
            return AdaptiveBucket(tick.model, len(lengths), sum(lengths), None, 0, lengths)
        shape = rounded(tick, self._limits)
        longest = 1 << (int(tick.row_counts.max()) - 1).bit_length()
        longest = min(longest, self._limits.max_length)
        num_rows = min(shape.num_sequences * longest, self._limits.num_tokens)
        return AdaptiveBucket(tick.model, shape.num_sequences, shape.num_tokens, num_rows, longest, shape.lengths)

    def _record(self, tick: Round, bucket: AdaptiveBucket) -> np.ndarray:
        buffer, view = blank(layout(bucket))
        num = len(tick.slots)
        view["slots"][:num] = tick.slots
        view["slots"][num:] = tick.slots[0]
        view["starts"][1 : num + 1] = tick.lengths.cumsum()
        if bucket.lengths is None:
            view["starts"][num + 1 :] = view["starts"][num]
        else:
            view["starts"][1:] = np.cumsum(bucket.lengths)
        columns = {"sequences": tick.sequences, "steps": tick.steps, "ends": tick.ends, "counts": tick.counts}
        for name, column in {**columns, "num_masked": tick.num_masked}.items():
            view[name][:num] = column
        view["num_masked"][num:] = 1
        return buffer

    def _pack(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs) -> Packed:
        """The tick's sequences back to back, copied out of their slots."""
        tokens = self._slots.gather(bucket, inputs, out=self._workspace.view("tick_tokens", bucket.num_tokens))
        return Packed.of(tokens, inputs.starts, self._models[0].spec.mask_id)

    def _advance(
        self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed, wanted: Tensor, mask_rate: Tensor
    ) -> None:
        """Draw for the candidates, bool [T] `wanted`, and write down what is kept. mask_rate: fp32 [B]."""
        with self._spans("transfer"):
            found = Candidates.of(packed, wanted, bucket.num_rows, bucket.longest)
        self._num_rows, self._revealed = found.num, None
        if len(found.rows):
            batch = self._batch_of(bucket, inputs, packed, found, mask_rate)
            drawn = self._draw_all(self._models[bucket.model], bucket, inputs, batch, found)
            kept = self._choose_rows(inputs, found, drawn)
            self._reveal(inputs, found, drawn, kept)
            if self._device.type == "cpu":
                self._revealed = found.owner[kept], found.position[kept]

    def _batch_of(
        self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed, found: Candidates, mask_rate: Tensor
    ) -> Batch:
        """What the network is given."""
        lengths = Offsets(inputs.starts, self._limits.max_length) if bucket.lengths is None else bucket.lengths
        return Batch(packed.tokens, lengths, found.rows, found.row_counts, mask_rate, found.position, self._spans)

    def _draw_all(
        self, denoiser: Denoiser, bucket: AdaptiveBucket, inputs: AdaptiveInputs, batch: Batch, found: Candidates
    ) -> Drawn:
        owner = found.owner.clamp(max=found.num_sequences - 1)
        keys = torch.stack((inputs.sequences[owner], found.position, inputs.steps[owner]), dim=1)
        targets = self._targets(inputs, found.owner, found.position)
        seconds, pieces = self._seconds_of(bucket.model), []
        for part, hidden in self._timed_chunks(self._chunks(denoiser, batch, bucket, inputs), seconds):
            with timed(seconds, "head"), self._spans("head"):
                pieces.append(self._score(denoiser, hidden, keys[part], targets[part]))
        return Drawn(*(None if column[0] is None else torch.cat(column) for column in zip(*pieces, strict=True)))

    def _targets(self, inputs: AdaptiveInputs, owner: Tensor, position: Tensor) -> Tensor:
        """int64: places in the slots; the spare one for what belongs to no sequence."""
        used = owner < len(inputs.slots)
        place = inputs.slots[owner.clamp(max=len(inputs.slots) - 1)] * self._slots.length + position
        return torch.where(used, place, self._slots.spare)

    @abstractmethod
    def _score(self, denoiser: Denoiser, hidden: Tensor, keys: Tensor, targets: Tensor) -> Drawn:
        """Draw for some of the candidates; targets: their places in the slots."""

    @abstractmethod
    def _choose_rows(self, inputs: AdaptiveInputs, found: Candidates, drawn: Drawn) -> Tensor:
        """bool [R]: which candidates keep their token."""

    def _reveal(self, inputs: AdaptiveInputs, found: Candidates, drawn: Drawn, kept: Tensor) -> None:
        lawful = drawn.token >= 0
        places = self._targets(inputs, found.owner, found.position)
        targets = torch.where(kept & lawful, places, self._slots.spare)
        steps = inputs.steps[found.owner.clamp(max=found.num_sequences - 1)].int()
        self._slots.tokens.index_copy_(0, targets, drawn.token.clamp(min=0))  # networks read the spare place
        logprob = torch.where(lawful, drawn.logprob, math.nan)  # `HandOut` looks for it
        self._slots.logprobs.index_copy_(0, torch.where(lawful, targets, places), logprob)
        self._slots.reveal_step.index_copy_(0, targets, steps)

    def _also_revealed(self, owner: Tensor, position: Tensor) -> None:
        """Positions beside those that were drawn, to be told of."""
        both = [owner * self._slots.length + position]
        if self._revealed is not None:
            both.append(self._revealed[0] * self._slots.length + self._revealed[1])
        place = torch.cat(both).sort().values
        self._revealed = place // self._slots.length, place % self._slots.length

    def _count(self, tick: Round) -> None:
        if not self._executors[tick.model].padded:  # else the host knows a bound only
            tick = replace(tick, row_counts=self._num_rows.cpu().numpy().astype(np.int32))
        super()._count(tick)

    def _hand_out(self, hand_out: HandOut) -> Iterator[Sample]:
        for sample in super()._hand_out(hand_out):
            self._num_tokens += int((sample.reveal_step >= 0).sum())
            yield sample

    def _tell(self, tick: Round) -> Round:
        if self._device.type != "cpu" or self._revealed is None:  # a GPU would be waited for
            return tick.with_rows(np.zeros(len(tick.slots), np.int32), np.empty(0, np.int32))
        owner, position = self._revealed
        counts = torch.bincount(owner, minlength=len(tick.slots))[: len(tick.slots)]
        return tick.with_rows(counts.numpy().astype(np.int32), position.numpy().astype(np.int32))


def layout(bucket: AdaptiveBucket) -> dict[str, Field]:
    """Where each field of a record lies."""
    shape = (bucket.num_sequences,)
    return fields_of(
        {
            "slots": (np.int64, shape),
            "starts": (np.int32, (bucket.num_sequences + 1,)),
            **dict.fromkeys(("sequences", "steps", "ends", "counts", "num_masked"), (np.int64, shape)),
        }
    )
