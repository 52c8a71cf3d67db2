"""The loop of `Confidence`: every masked position of the window is a candidate, and the best keep their token."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from unmask.adaptive import Confidence
from unmask.adaptive_run import AdaptiveBucket, AdaptiveInputs, AdaptiveRun, Drawn
from unmask.candidates import Candidates, Packed
from unmask.choose import Categorical
from unmask.denoiser import Denoiser
from unmask.graphs import Fetched
from unmask.kernels import HeadSample
from unmask.kernels.noise import order_gumbel
from unmask.rounds import Round, Rounds
from unmask.run import without
from unmask.slots import HandOut
from unmask.tables import LoadedTick

NETWORK_LAW = Categorical()


class ConfidenceRun(AdaptiveRun):
    """One run of `Confidence`; other arguments as of `AdaptiveRun`. stop_id: where a window is complete and holds it,
    it fills the rest of the sequence, which is finished then."""

    def __init__(
        self,
        denoisers: Mapping[str, Denoiser],
        timeline: Rounds,
        *,
        policy: Confidence,
        stop_id: int | None = None,
        **options,
    ) -> None:
        self._stop_id = stop_id
        self._bounded = policy.entropy_bound is not None
        self._counted = policy.threshold is None and not self._bounded
        self._watched: deque[tuple[Round, Fetched]] = deque()
        self._complete: set[int] = set()
        super().__init__(denoisers, timeline, policy=policy, **options)
        shared = policy.eps is not None and self._choose.draw_mask
        self._shares = torch.from_numpy(policy.shares).to(self._device) if shared else None
        self._doubtful = {}
        if policy.doubted:
            self._doubtful = {one: without(self._biases[one], policy.doubted) for one in self._models}

    @property
    def _window(self) -> int:
        # What scores decide is known after a tick only.
        return super()._window if self._counted and self._stop_id is None else 1

    def _step(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs) -> None:
        with self._spans("transfer"):
            packed = self._pack(bucket, inputs)
            ends = self._ends(packed, inputs)
            mask_rate = (packed.per_sequence(packed.masked) / inputs.num_masked).float()
        self._advance(bucket, inputs, packed, packed.masked & packed.before(ends), mask_rate)
        self._close(bucket, inputs, packed, ends)

    def _ends(self, packed: Packed, inputs: AdaptiveInputs) -> Tensor:
        """int64 [B]: where the window of each sequence ends."""
        first = inputs.slots * self._slots.length + packed.first_masked()
        return torch.where(inputs.ends < 0, self._slots.window_end[first].long(), inputs.ends)

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
        # Where every possible id is doubted there is no law.
        options = {"bias": self._doubtful.get(denoiser), "choose": law, "check": False}
        asked = self._draw(denoiser, hidden, keys, targets, want=("lse",), **options)
        logit = drawn.logprob + drawn.lse
        if policy.untempered:
            logit = logit * (choose.temperature or 1.0)
        value = logit - asked.lse
        for one in policy.doubted:
            value = torch.where(drawn.tokens == one, -math.inf, value)
        return value

    def _choose_rows(self, inputs: AdaptiveInputs, found: Candidates, drawn: Drawn) -> Tensor:
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
        if self._device.type == "cpu":
            self._also_revealed(packed.owner[filled], packed.position[filled])

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
                if self._on_tick is not None:
                    self._complete.add(sequence)
                yield self._slots.take(torch.tensor([slot], device=self._device), [sequence], [request.length])

    def _tell(self, tick: Round) -> Round:
        """With the sequences that were found to be complete, of which the host did not know."""
        complete = np.isin(tick.sequences, list(self._complete))
        self._complete.difference_update(tick.sequences.tolist())
        return replace(super()._tell(tick), finished=tick.finished | complete)
