"""The loop of `RemaskConfidence`: chance picks the candidates, who all keep their token, and whom to mask again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.adaptive_run import AdaptiveBucket, AdaptiveInputs, AdaptiveRun, Drawn
from unmask.candidates import Candidates, Packed
from unmask.denoiser import Denoiser
from unmask.kernels.noise import policy_uniforms
from unmask.remask import RemaskConfidence
from unmask.rounds import Round, Rounds

# Weights of a softmax as whole numbers, whose sum is the same in any order; exp(-p) is at least 0.36 of one.
ONE = 1 << 30


class Moves(NamedTuple):
    """What a step does to T tokens. reveal, mask: bool [T]. mask_rate: fp32 [B], what a denoiser is told."""

    reveal: Tensor
    mask: Tensor
    mask_rate: Tensor


class RemaskRun(AdaptiveRun):
    """One run of `RemaskConfidence`; other arguments as of `AdaptiveRun`. In its exact shape a network call has the
    sequences alone in which something is revealed, and is left out where there are none."""

    def __init__(
        self, denoisers: Mapping[str, Denoiser], timeline: Rounds, *, policy: RemaskConfidence, **options
    ) -> None:
        self._busy: Tensor | None = None
        self._masked: tuple[Tensor, Tensor] | None = None
        super().__init__(denoisers, timeline, policy=policy, **options)
        self._chances = torch.from_numpy(policy.chances).to(self._device)
        self._grid = torch.from_numpy(policy.grid).to(self._device)

    def _step(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs) -> None:
        with self._spans("transfer"):
            packed = self._pack(bucket, inputs)
            moves = self._moves(bucket, inputs, packed)
            targets = self._targets(
                inputs, torch.where(moves.mask, packed.owner, packed.num_sequences), packed.position
            )
            if self._device.type == "cpu":
                self._masked = packed.owner[moves.mask], packed.position[moves.mask]
            if bucket.num_rows is None:
                bucket, inputs, packed, moves = self._only_busy(bucket, inputs, packed, moves)
        self._advance(bucket, inputs, packed, moves.reveal, moves.mask_rate)
        self._slots.tokens.index_fill_(0, targets, self._models[0].spec.mask_id)

    def _moves(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed) -> Moves:
        """One uniform number decides of each position: if masked, to be revealed, and else to be masked again."""
        step = inputs.steps % self._chances.shape[1]  # of its window
        reveal, bound = self._chances[:, step]
        number = policy_uniforms(
            self._seed, packed.spread(inputs.sequences), packed.position, packed.spread(inputs.steps)
        )
        inside = packed.before(inputs.ends) & (packed.owner < packed.num_sequences)
        drawn = self._drawn_since(inputs.steps - step, bucket, inputs, packed) & inside
        weight = torch.where(drawn, self._weights(bucket, inputs, packed), 0)
        share = weight.double() / packed.spread(packed.per_sequence(weight)).clamp(min=1)
        waiting = packed.masked & inside
        in_window, beyond = packed.per_sequence(waiting | drawn), packed.per_sequence(packed.masked & ~inside)
        return Moves(
            waiting & (number < packed.spread(reveal)),
            drawn & (number < share * packed.spread(bound)),
            ((self._grid[step] * in_window + beyond) / inputs.num_masked).float(),
        )

    def _drawn_since(self, first: Tensor, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed) -> Tensor:
        """bool [T]: revealed in steps from int64 [B] `first` on, and not given."""
        step = torch.empty_like(packed.tokens, dtype=torch.int32)
        self._slots.gather(bucket, inputs, out=step, source=self._slots.reveal_step)
        return ~packed.masked & (step >= packed.spread(first))

    def _weights(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed) -> Tensor:
        """int64 [T]: exp(-p), p the probability that the token had when it was drawn."""
        logprob = torch.empty_like(packed.tokens, dtype=torch.float32)
        self._slots.gather(bucket, inputs, out=logprob, source=self._slots.logprobs)
        return (logprob.double().exp().neg().exp() * ONE).long()

    def _only_busy(
        self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed, moves: Moves
    ) -> tuple[AdaptiveBucket, AdaptiveInputs, Packed, Moves]:
        busy = self._busy = packed.per_sequence(moves.reveal).nonzero().squeeze(1)
        if len(busy) == packed.num_sequences:
            return bucket, inputs, packed, moves
        part = packed.only(busy)
        reveal = moves.reveal[torch.isin(packed.owner, busy)]
        lengths = tuple(bucket.lengths[one] for one in busy.tolist())
        bucket = bucket._replace(num_sequences=len(busy), num_tokens=len(part.tokens), lengths=lengths)
        columns = {name: column[busy] for name, column in inputs._asdict().items() if name != "starts"}
        return bucket, AdaptiveInputs(starts=part.starts, **columns), part, Moves(reveal, None, moves.mask_rate[busy])

    def _score(self, denoiser: Denoiser, hidden: Tensor, keys: Tensor, targets: Tensor) -> Drawn:
        drawn = self._draw(denoiser, hidden, keys, targets)
        return Drawn(drawn.tokens, drawn.logprob.float())

    def _choose_rows(self, inputs: AdaptiveInputs, found: Candidates, drawn: Drawn) -> Tensor:
        return found.owner < found.num_sequences

    def _count(self, tick: Round) -> None:
        if self._busy is None:
            super()._count(tick)
        elif len(self._busy):
            busy = self._busy.cpu().numpy()
            super()._count(replace(tick, slots=tick.slots[busy], lengths=tick.lengths[busy]))
        else:
            self._num_finished += int(tick.finished.sum())

    def _tell(self, tick: Round) -> Round:
        if self._device.type != "cpu":
            return super()._tell(tick)
        if self._revealed is not None and self._busy is not None:
            owner, position = self._revealed
            self._revealed = self._busy[owner], position
        owner, position = self._masked
        slot = tick.slots[owner.numpy()]
        return replace(super()._tell(tick), masked_slot=slot, masked_position=position.numpy().astype(np.int32))
