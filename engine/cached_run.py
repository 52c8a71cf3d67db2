"""The loop of `Confidence` with keys and values kept between the steps of a window."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unmask.adaptive_run import AdaptiveBucket, AdaptiveInputs, AdaptiveSlots
from unmask.caching import Caching, Context, KeyValues
from unmask.candidates import Candidates, Packed
from unmask.confidence_run import ConfidenceRun
from unmask.denoiser import Batch
from unmask.graphs import Exact
from unmask.rounds import Round
from unmask.tables import LoadedTick
from unmask.timeline import Limits


class CachedSlots(AdaptiveSlots):
    """window: int64 [slots], the end of the window for which keys and values of a sequence are kept, 0 for none. age:
    int64 [slots], steps since all of them were computed."""

    def __init__(self, limits: Limits, device: torch.device, **keep: bool) -> None:
        super().__init__(limits, device, **keep)
        self.window, self.age = (torch.zeros(limits.max_resident, dtype=torch.int64, device=device) for _ in range(2))

    @staticmethod
    def nbytes(limits: Limits) -> int:
        return AdaptiveSlots.nbytes(limits) + 2 * 8 * limits.max_resident

    def _reset_steps(self, loaded: LoadedTick) -> None:
        super()._reset_steps(loaded)
        for slots, _ in loaded.admitted:
            self.window.index_fill_(0, slots, 0)


class CachedRun(ConfidenceRun):
    """One run with `caching`; other arguments as of `ConfidenceRun`. The host waits for a GPU in each tick: which
    tokens a call computes depends on which window a sequence is in."""

    slots_type = CachedSlots

    def __init__(self, *arguments, caching: Caching, **options) -> None:
        super().__init__(*arguments, **options)
        (denoiser,) = self._models
        self._caching = caching
        self._executors = [Exact(self._device, spans=self._spans)]
        self._key_values = KeyValues(denoiser, self._limits)
        self._buffer_bytes += KeyValues.nbytes(denoiser, self._limits)

    def _release(self) -> None:
        super()._release()
        self._key_values = None

    def _step(self, bucket: AdaptiveBucket, inputs: AdaptiveInputs) -> None:
        self._lengths = [0] * bucket.num_sequences  # as long as nothing is masked, nothing is computed
        super()._step(bucket, inputs)

    def _batch_of(
        self, bucket: AdaptiveBucket, inputs: AdaptiveInputs, packed: Packed, found: Candidates, mask_rate: Tensor
    ) -> Batch:
        batch = super()._batch_of(bucket, inputs, packed, found, mask_rate)
        lengths = torch.tensor(bucket.lengths, device=self._device)
        begins, stops = self._computed(inputs, packed, self._ends(packed, inputs), lengths)
        computed = (packed.position >= begins[packed.owner]) & (packed.position < stops[packed.owner])
        index = computed.nonzero().squeeze(1)
        around = inputs.slots[packed.owner] * self._slots.length + packed.position
        context = Context(self._key_values.stored, around[index], around, bucket.lengths, packed.position[index])
        self._lengths = (stops - begins).tolist()
        return replace(
            batch,
            tokens=packed.tokens[index],
            lengths=tuple(self._lengths),
            rows=(computed.cumsum(0) - 1)[found.rows],
            context=context,
        )

    def _computed(self, inputs: AdaptiveInputs, packed: Packed, ends: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B] each: the tokens of each sequence that this step computes, from the first to before the second."""
        slots, caching = self._slots, self._caching
        age = slots.age[inputs.slots] + 1
        stale = slots.window[inputs.slots] != ends
        if caching.refresh is not None:
            stale |= age >= caching.refresh
        slots.window.index_copy_(0, inputs.slots, ends)
        slots.age.index_copy_(0, inputs.slots, torch.where(stale, 0, age))
        begins = slots.window_start[inputs.slots * slots.length + packed.first_masked()].long()
        if self._models[0].spec.shift:
            begins = (begins - 1).clamp_(min=0)  # the row before predicts the window's first position
        stops = ends if caching.kind == "dual" else lengths
        return torch.where(stale, 0, begins), torch.where(stale, lengths, stops)

    def _count(self, tick: Round) -> None:
        super()._count(replace(tick, lengths=np.array(self._lengths, np.int32)))
