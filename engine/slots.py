"""The state of the resident sequences: their tokens, log-probabilities and reveal steps, a slot for each."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from unmask.graphs import Fetched
from unmask.kernels import NonFiniteLogits
from unmask.tables import Bucket, LoadedTick, TickInputs
from unmask.timeline import Limits, Tick

Finished = tuple[int, Tensor, Tensor, Tensor]


class Slots:
    """`limits.max_resident` slots of `limits.max_length` tokens, allocated once.

    tokens: int64, logprobs: float32, flat on the device, a slot after the other. They have one place more, `spare`:
    what a padded tick does not use reads and writes there. The reveal steps stay on the host, which knows them.
    """

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self.length, self.spare = limits.max_length, limits.max_resident * limits.max_length
        self.tokens = torch.zeros(self.spare + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(self.spare + 1, device=device)
        self.reveal_step = np.empty((limits.max_resident, self.length), np.int32)

    @staticmethod
    def nbytes(limits: Limits) -> int:
        """Bytes of all three."""
        places = limits.max_resident * limits.max_length
        return (places + 1) * (8 + 4) + places * 4

    @property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """tokens and logprobs as [slots, length]."""
        return self.tokens[:-1].view(-1, self.length), self.logprobs[:-1].view(-1, self.length)

    def admit(self, loaded: LoadedTick) -> None:
        """Write the templates of the sequences that a tick brings in."""
        tokens, logprobs = self._rows
        for slots, template in loaded.admitted:
            tokens[:, : len(template)].index_copy_(0, slots, template.expand(len(slots), -1))
            logprobs.index_fill_(0, slots, 0.0)
        for slots, _, _ in loaded.tick.admitted:
            self.reveal_step[slots] = -1

    def mask(self, loaded: LoadedTick, mask_id: int) -> None:
        """Take back the tokens that are masked again before a tick."""
        if loaded.masked is not None:
            self.tokens.index_fill_(0, loaded.masked, mask_id)

    def gather(self, bucket: Bucket, inputs: TickInputs, out: Tensor) -> Tensor:
        """Copy the tokens of a tick's sequences to `out`, int64 [T], back to back."""
        if bucket.lengths == (self.length,) * bucket.num_sequences:
            rows, _ = self._rows
            torch.index_select(rows, 0, inputs.slots, out=out.view(bucket.num_sequences, self.length))
            return out
        place = torch.arange(bucket.num_tokens, dtype=torch.int32, device=out.device)
        owner = torch.bucketize(place, inputs.starts[1:], right=True).clamp_(max=bucket.num_sequences - 1)
        source = inputs.slots[owner] * self.length + (place - inputs.starts[owner])
        used = place < inputs.starts[-1]
        return torch.index_select(self.tokens, 0, torch.where(used, source, self.spare), out=out)

    def note(self, tick: Tick) -> None:
        """Remember the steps of what the tick revealed."""
        self.reveal_step[tick.row_slot, tick.row_position] = np.repeat(tick.steps, tick.row_counts)

    def fetch(self, loaded: LoadedTick) -> "HandOut":
        """Start to fetch what a tick completed; its slots may be written again by the next."""
        return HandOut(loaded.tick, self.reveal_step, *(rows.index_select(0, loaded.finished) for rows in self._rows))


class HandOut:
    """The sequences that a tick completed, on their way to the host."""

    def __init__(self, tick: Tick, reveal_step: np.ndarray, tokens: Tensor, logprobs: Tensor) -> None:
        done = tick.finished
        self._sequences, self._lengths = tick.sequences[done].tolist(), tick.lengths[done].tolist()
        self._reveal_step = torch.from_numpy(reveal_step[tick.slots[done]])  # a copy: the slots are taken again
        self._fetched = Fetched((tokens, logprobs))

    @property
    def ready(self) -> bool:
        return self._fetched.ready

    def finished(self, mask_id: int) -> Iterator[Finished]:
        """(sequence, tokens int64 [L], logprobs float32 [L], reveal_step int32 [L]).

        A row that had no finite law was left masked by a head that does not wait to look: NonFiniteLogits names it.
        """
        columns = *(_pageable(column) for column in self._fetched.wait()), self._reveal_step
        for row, (sequence, length) in enumerate(zip(self._sequences, self._lengths, strict=True)):
            tokens, logprobs, reveal_step = (column[row, :length] for column in columns)
            masked = (tokens == mask_id).nonzero()
            if len(masked):
                raise NonFiniteLogits(
                    f"sequence {sequence}, position {int(masked[0])}: a logit was NaN or +inf, or no id was possible"
                )
            yield sequence, tokens, logprobs, reveal_step


def _pageable(tensor: Tensor) -> Tensor:
    """A tensor in ordinary memory: a GPU's copies arrive in pages that cannot be swapped out, few of which should be
    kept."""
    return tensor.clone() if tensor.is_pinned() else tensor
