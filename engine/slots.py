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
    template: int64, as the tokens were at first, kept with `keep_template`. allowed: int32, which of the request's
    lists of ids a position may draw from, kept with `keep_allowed`. Both are flat on the device too.
    """

    def __init__(
        self, limits: Limits, device: torch.device, *, keep_template: bool = False, keep_allowed: bool = False
    ) -> None:
        self.length, self.spare = limits.max_length, limits.max_resident * limits.max_length
        self.tokens = torch.zeros(self.spare + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(self.spare + 1, device=device)
        self.template = torch.zeros_like(self.tokens) if keep_template else None
        self.allowed = torch.zeros(self.spare + 1, dtype=torch.int32, device=device) if keep_allowed else None
        self.reveal_step = np.empty((limits.max_resident, self.length), np.int32)

    @staticmethod
    def nbytes(limits: Limits) -> int:
        """Bytes of all three."""
        places = limits.max_resident * limits.max_length
        return (places + 1) * (8 + 4) + places * 4

    def _rows(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Flat tensors as [slots, length]."""
        return tuple(one[:-1].view(-1, self.length) for one in flat)

    def _write(self, flat: Tensor | None, slots: Tensor, row: Tensor) -> None:
        """The same row [L] at the begin of slots [A]."""
        if flat is not None:
            (rows,) = self._rows(flat)
            rows[:, : len(row)].index_copy_(0, slots, row.expand(len(slots), -1))

    def admit(self, loaded: LoadedTick) -> None:
        """Write the templates of the sequences that a tick brings in."""
        (logprobs,) = self._rows(self.logprobs)
        for slots, rows in loaded.admitted:
            for name, row in rows.items():
                self._write(getattr(self, name), slots, row)
            self._write(self.template, slots, rows["tokens"])
            logprobs.index_fill_(0, slots, 0.0)
        self._reset_steps(loaded)

    def _reset_steps(self, loaded: LoadedTick) -> None:
        for slots, _, _ in loaded.tick.admitted:
            self.reveal_step[slots] = -1

    def mask(self, loaded: LoadedTick, mask_id: int) -> None:
        """Take back the tokens that are masked again before a tick."""
        if loaded.masked is not None:
            self.tokens.index_fill_(0, loaded.masked, mask_id)

    def gather(self, bucket: Bucket, inputs: TickInputs, out: Tensor, source: Tensor | None = None) -> Tensor:
        """Copy the tokens of a tick's sequences to `out`, int64 [T], back to back; or from another flat tensor."""
        source = self.tokens if source is None else source
        if bucket.lengths == (self.length,) * bucket.num_sequences:
            (rows,) = self._rows(source)
            torch.index_select(rows, 0, inputs.slots, out=out.view(bucket.num_sequences, self.length))
            return out
        place = torch.arange(bucket.num_tokens, dtype=torch.int32, device=out.device)
        owner = torch.bucketize(place, inputs.starts[1:], right=True).clamp_(max=bucket.num_sequences - 1)
        index = inputs.slots[owner] * self.length + (place - inputs.starts[owner])
        used = place < inputs.starts[-1]
        return torch.index_select(source, 0, torch.where(used, index, self.spare), out=out)

    def note(self, tick: Tick) -> None:
        """Remember the steps of what the tick revealed."""
        self.reveal_step[tick.row_slot, tick.row_position] = np.repeat(tick.steps, tick.row_counts)

    def fetch(self, loaded: LoadedTick) -> "HandOut":
        """Start to fetch what a tick completed; its slots may be written again by the next."""
        tick, done = loaded.tick, loaded.tick.finished
        columns = (rows.index_select(0, loaded.finished) for rows in self._rows(self.tokens, self.logprobs))
        steps = torch.from_numpy(self.reveal_step[tick.slots[done]])  # a copy: the slots are taken again
        return HandOut(tick.sequences[done].tolist(), tick.lengths[done].tolist(), *columns, steps)


class HandOut:
    """Completed sequences on their way to the host: tokens, logprobs and reveal_step [S, slot length], the last of them
    there already where the host knows it."""

    def __init__(
        self, sequences: list[int], lengths: list[int], tokens: Tensor, logprobs: Tensor, reveal_step: Tensor
    ) -> None:
        self._sequences, self._lengths = sequences, lengths
        self._fetched = Fetched((tokens, logprobs, reveal_step))

    @property
    def ready(self) -> bool:
        return self._fetched.ready

    def finished(self, mask_id: int | None) -> Iterator[Finished]:
        """(sequence, tokens int64 [L], logprobs float32 [L], reveal_step int32 [L]).

        A row that had no finite law was left masked by a head that does not wait to look: NonFiniteLogits names it.
        With mask_id None a position may be masked still, and its log-probability tells.
        """
        columns = tuple(_pageable(column) for column in self._fetched.wait())
        for row, (sequence, length) in enumerate(zip(self._sequences, self._lengths, strict=True)):
            tokens, logprobs, reveal_step = (column[row, :length] for column in columns)
            lawless = (logprobs.isnan() if mask_id is None else tokens == mask_id).nonzero()
            if len(lawless):
                raise NonFiniteLogits(
                    f"sequence {sequence}, position {int(lawless[0])}: a logit was NaN or +inf, or no id was possible"
                )
            yield sequence, tokens, logprobs, reveal_step


def _pageable(tensor: Tensor) -> Tensor:
    """A tensor in ordinary memory: a GPU's copies arrive in pages that cannot be swapped out, few of which should be
    kept."""
    return tensor.clone() if tensor.is_pinned() else tensor
