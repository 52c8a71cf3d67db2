"""The loop of adaptive policies: candidates → denoiser → hidden rows → `sample_head` → the best keep their token."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from unmask.adaptive import Confidence
from unmask.candidates import Candidates, Packed
from unmask.choose import Categorical
from unmask.denoiser import Batch, Denoiser
from unmask.graphs import Fetched
from unmask.kernels import HeadSample, Offsets
from unmask.kernels.noise import order_gumbel
from unmask.rounds import Round, Rounds
from unmask.run import Run, timed, without
from unmask.samples import Sample
from unmask.slots import HandOut, Slots
from unmask.tables import Field, LoadedTick, blank, fields_of, read, rounded
from unmask.timeline import Limits, Tick

NETWORK_LAW = Categorical()


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
    """What a step drew for R candidates: token int64, its log-probability and score fp32, and the entropy of its law
    where a bound on it decides."""

    token: Tensor
    logprob: Tensor
    score: Tensor
    entropy: Tensor | None


class AdaptiveRun(Run):
    """One run of an adaptive policy; arguments as of `Run`. policy: how a step chooses. stop_id: where a window is
    complete and holds it, it fills the rest of the sequence, which is finished then."""

    slots_type = AdaptiveSlots
    timeline: Rounds

    def __init__(
        self,
        denoisers: Mapping[str, Denoiser],
        timeline: Rounds,
        *,
        policy: Confidence,
        stop_id: int | None = None,
        **options,
    ) -> None:
        self._policy, self._stop_id = policy, stop_id
        self._bounded = policy.entropy_bound is not None
        self._counted = policy.threshold is None and not self._bounded
        self._watched: deque[tuple[Round, Fetched]] = deque()
        self._found: Candidates | None = None
        self._kept: Tensor | None = None
        super().__init__(denoisers, timeline, **options)
        shared = policy.eps is not None and self._choose.draw_mask
        self._shares = torch.from_numpy(policy.shares).to(self._device) if shared else None
        self._doubtful = {}
        if policy.doubted:
            self._doubtful = {one: without(self._biases[one], policy.doubted) for one in self._models}

    @property
    def _window(self) -> int:
        # What scores decide is known after a tick only.
        return super()._window if self._counted and self._stop_id is None else 1

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

    def _step(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs) -> None:
        denoiser, mask_id = self._models[bucket.model], self._models[0].spec.mask_id
        with self._spans("transfer"):
            tokens = self._slots.gather(bucket, inputs, out=self._workspace.view("tick_tokens", bucket.num_tokens))
            packed = Packed.of(tokens, inputs.starts, mask_id)
            ends = self._ends(packed, inputs)
            found = Candidates.of(packed, ends, bucket.num_rows, bucket.longest)
        self._found, self._kept = found, None
        if len(found.rows):
            batch = self._batch_of(bucket, inputs, packed, ends, found)
            drawn = self._draw_all(denoiser, bucket, inputs, batch, found)
            self._kept = self._choose_rows(inputs, found, drawn)
            self._reveal(inputs, found, drawn, self._kept)
        self._close(bucket, inputs, packed, ends)

    def _ends(self, packed: Packed, inputs: AdaptiveInputs) -> Tensor:
        """int64 [B]: where the window of each sequence ends."""
        first = inputs.slots * self._slots.length + packed.first_masked()
        return torch.where(inputs.ends < 0, self._slots.window_end[first].long(), inputs.ends)

    def _batch_of(
        self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed, ends: Tensor, found: Candidates
    ) -> Batch:
        """What the network is given."""
        lengths = Offsets(inputs.starts, self._limits.max_length) if bucket.lengths is None else bucket.lengths
        mask_rate = (packed.per_sequence(packed.masked) / inputs.num_masked).float()
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

    def _score(self, denoiser: Denoiser, hidden: Tensor, keys: Tensor, targets: Tensor) -> Drawn:
        score = self._policy.score
        want = {"logprob": None, "lse": None} | ({"entropy": None} if self._bounded else {})
        want |= {score: None} if score in ("margin", "entropy") else {}
        drawn = self._draw(denoiser, hidden, keys, targets, want=tuple(want))
        if score == "probability":
            value = self._logprob(denoiser, hidden, keys, targets, drawn).exp()
        elif score == "random":
            value = order_gumbel(self._seed, keys)
        else:
            value = drawn.margin if score == "margin" else -drawn.entropy
        value = torch.where(drawn.tokens >= 0, value.float(), -math.inf)  # a row without a law is never the best
        if self._policy.temperature_of_order and score != "random":
            value = value / self._policy.temperature_of_order + order_gumbel(self._seed, keys)
        return Drawn(drawn.tokens, drawn.logprob.float(), value, drawn.entropy if self._bounded else None)

    def _logprob(self, denoiser: Denoiser, hidden: Tensor, keys: Tensor, targets: Tensor, drawn: HeadSample) -> Tensor:
        """[R]: of the drawn tokens, in the law that the policy asks for."""
        choose, policy = self._choose, self._policy
        plain = choose.temperature in (0, 1) and choose.top_k is None and choose.top_p is None
        if not policy.doubted and (plain or not policy.untempered):
            return drawn.logprob
        law = NETWORK_LAW if policy.untempered else choose
        asked = self._draw(
            denoiser, hidden, keys, targets, want=("lse",), bias=self._doubtful.get(denoiser), choose=law
        )  # fmt: skip
        logit = drawn.logprob + drawn.lse
        if policy.untempered:
            logit = logit * (choose.temperature or 1.0)
        value = logit - asked.lse
        for one in policy.doubted:
            value = torch.where(drawn.tokens == one, -math.inf, value)
        return value

    def _choose_rows(self, inputs: AdaptiveInputs, found: Candidates, drawn: Drawn) -> Tensor:
        """bool [R]: which candidates keep their token."""
        policy = self._policy
        if self._counted:
            return found.best(drawn.score, self._counts(inputs, found))
        if self._bounded:
            return found.bounded(drawn.score, drawn.entropy.float(), policy.entropy_bound)
        threshold = -policy.threshold if policy.score == "entropy" else policy.threshold
        return found.above(drawn.score, threshold, policy.per_step or 1)

    def _counts(self, inputs: AdaptiveInputs, found: Candidates) -> Tensor:
        """int64 [B]: how many candidates keep their token. Where a share of what is masked does and a token may be the
        mask id, only the device knows how many are masked."""
        if self._shares is None:
            return inputs.counts
        return (found.num * self._shares[inputs.steps % len(self._shares)]).long()

    def _reveal(self, inputs: AdaptiveInputs, found: Candidates, drawn: Drawn, kept: Tensor) -> None:
        kept = kept & (drawn.token >= 0)
        targets = torch.where(kept, self._targets(inputs, found.owner, found.position), self._slots.spare)
        steps = inputs.steps[found.owner.clamp(max=found.num_sequences - 1)].int()
        self._slots.tokens.index_copy_(0, targets, drawn.token)
        self._slots.logprobs.index_copy_(0, targets, drawn.logprob)
        self._slots.reveal_step.index_copy_(0, targets, steps)

    def _close(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, before: Packed, ends: Tensor) -> None:
        """Fill sequences that have come to their stop; note how many positions are masked still."""
        tokens = self._slots.gather(bucket, inputs, out=before.tokens)
        packed = Packed.of(tokens, inputs.starts, self._models[0].spec.mask_id)
        left = packed.per_sequence(packed.masked)
        if self._stop_id is not None:
            stopped = self._at_stop(bucket, inputs, packed, ends)
            self._fill(inputs, packed, stopped)
            left = torch.where(stopped, 0, left)
        nobody = len(self._slots.num_left) - 1
        self._slots.num_left.index_copy_(0, torch.where(inputs.ends == 0, nobody, inputs.slots), left)

    def _at_stop(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed, ends: Tensor) -> Tensor:
        """bool [B]: whose window is complete, with the stop among what was drawn so far."""
        step = torch.empty_like(packed.tokens, dtype=torch.int32)
        self._slots.gather(bucket, inputs, out=step, source=self._slots.reveal_step)
        inside = packed.before(ends)
        holds_it = packed.per_sequence(inside & (packed.tokens == self._stop_id) & (step >= 0)) > 0
        return holds_it & (packed.per_sequence(inside & packed.masked) == 0)

    def _fill(self, inputs: AdaptiveInputs, packed: Packed, stopped: Tensor) -> None:
        nobody = packed.num_sequences
        filled = pad(stopped, (0, 1))[packed.owner] & packed.masked
        owner = torch.where(filled, packed.owner, nobody)
        targets = self._targets(inputs, owner, packed.position)
        self._slots.tokens.index_fill_(0, targets, self._stop_id)
        self._slots.reveal_step.index_copy_(0, targets, pad(inputs.steps, (0, 1))[owner].int())

    def _count(self, tick: Round) -> None:
        if not self._executors[tick.model].padded:  # else the host knows a bound only
            tick = replace(tick, row_counts=self._found.num.numpy().astype(np.int32))
        super()._count(tick)

    def _fetch(self, loaded: LoadedTick) -> Iterator[HandOut]:
        yield from super()._fetch(loaded)
        if self._window == 1:
            self._watched.append((loaded.tick, Fetched((self._slots.num_left.clone(),))))
        while self._watched and self._watched[0][1].ready:
            yield from self._take_complete(*self._watched.popleft())

    def _take_complete(self, tick: Round, left: Fetched) -> Iterator[HandOut]:
        """The sequences that were complete after a tick, and have steps left."""
        (num_left,) = left.wait()
        for slot, sequence in zip(tick.slots.tolist(), tick.sequences.tolist(), strict=True):
            request = None if num_left[slot] else self.timeline.release(slot, sequence)
            if request is not None:
                self._num_finished += 1
                yield self._slots.take(torch.tensor([slot], device=self._device), [sequence], [request.length])

    def _hand_out(self, hand_out: HandOut) -> Iterator[Sample]:
        for sample in super()._hand_out(hand_out):
            self._num_tokens += int((sample.reveal_step >= 0).sum())
            yield sample

    def _tell(self, tick: Round) -> Round:
        if self._device.type != "cpu":
            return tick
        if self._kept is None:
            return tick.with_rows(np.zeros(len(tick.slots), np.int32), np.empty(0, np.int32))
        owner, position = self._found.owner[self._kept], self._found.position[self._kept]
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
