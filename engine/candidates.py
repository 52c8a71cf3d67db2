"""Candidates of a step: masked positions of each sequence's window, and which of them are revealed. On the device.

Nothing here waits for a device where `places` is given: shapes follow from the host's integers, and what is unused is
marked. Without it, on a CPU, the shapes are exact.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.kernels import Offsets


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed batch of B sequences and what is masked in it.

    tokens: int64 [T]. starts: int32 [B + 1]. owner: int64 [T], the sequence of each token, B of an unused one.
    position: int64 [T], its place in the sequence. masked: bool [T].
    """

    tokens: Tensor
    starts: Tensor
    owner: Tensor
    position: Tensor
    masked: Tensor

    @classmethod
    def of(cls, tokens: Tensor, starts: Tensor, mask_id: int) -> "Packed":
        place = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
        owner = torch.bucketize(place, starts[1:], right=True)
        position = place - starts[owner]
        return cls(tokens, starts, owner, position.long(), (tokens == mask_id) & (place < starts[-1]))

    @property
    def num_sequences(self) -> int:
        return len(self.starts) - 1

    def per_sequence(self, marked: Tensor) -> Tensor:
        """int64 [B]: how many of the places bool [T] are marked in each sequence."""
        total = torch.zeros(self.num_sequences + 1, dtype=torch.int64, device=marked.device)
        return total.index_add_(0, self.owner, marked.long())[:-1]

    def first_masked(self) -> Tensor:
        """int64 [B]: the lowest masked position of each sequence, 0 where none is."""
        far = torch.iinfo(torch.int64).max
        first = torch.full((self.num_sequences + 1,), far, device=self.tokens.device)
        first = first.scatter_reduce(0, self.owner, torch.where(self.masked, self.position, far), "amin")[:-1]
        return torch.where(first == far, 0, first)

    def before(self, ends: Tensor) -> Tensor:
        """bool [T]: positions below int64 [B] ends of their sequence."""
        return self.position < self.spread(ends)

    def spread(self, values: Tensor) -> Tensor:
        """[T]: of values [B] that of each place's sequence; any where unused."""
        return torch.cat((values, values[:1]))[self.owner]

    def only(self, chosen: Tensor) -> "Packed":
        """The sequences int64 [C] alone, ascending. Waits for a GPU."""
        among = torch.zeros(self.num_sequences + 1, dtype=torch.bool, device=chosen.device)
        here = among.index_fill_(0, chosen, True)[self.owner]
        lengths = self.starts.diff()[chosen]
        owner = torch.arange(len(chosen), device=chosen.device).repeat_interleave(lengths)
        starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return Packed(self.tokens[here], starts, owner, self.position[here], self.masked[here])


@dataclass(frozen=True, eq=False)
class Candidates:
    """The positions of B sequences that a step draws for: R rows, ascending.

    rows: int64 [R], places in the tokens. position, owner, rank: int64 [R], in its sequence, of which sequence (B where
    unused), and which of its candidates. num: int64 [B]. row_counts: of each sequence, for a `Batch`.
    """

    rows: Tensor
    position: Tensor
    owner: Tensor
    rank: Tensor
    num: Tensor
    row_counts: tuple[int, ...] | Offsets
    longest: int

    @classmethod
    def of(cls, packed: Packed, wanted: Tensor, places: int | None, longest: int) -> "Candidates":
        """wanted: bool [T], which. places: rows to make room for; None counts them, which waits for a GPU. longest: no
        sequence has more candidates, where places are given; what is wanted beyond it is none."""
        num = packed.per_sequence(wanted)
        if places is not None:
            # More than the host reckoned with: positions that found no finite law, and stay masked.
            before = wanted.cumsum(0) - packed.spread(num.cumsum(0) - num)
            wanted, num = wanted & (before <= longest), num.clamp(max=longest)
        row_starts = torch.nn.functional.pad(num.cumsum(0), (1, 0))
        if places is None:
            rows = wanted.nonzero().squeeze(1)
            row_counts = tuple(num.tolist())
            longest = max(row_counts, default=0)
            owner = packed.owner[rows]
        else:
            # A row more takes what is not wanted.
            index = torch.where(wanted, wanted.cumsum(0) - 1, places)
            place = torch.arange(len(wanted), device=wanted.device)
            rows = torch.zeros(places + 1, dtype=torch.int64, device=wanted.device).scatter_(0, index, place)[:places]
            row_counts = Offsets(row_starts.int(), longest)
            unused = torch.arange(places, device=rows.device) >= row_starts[-1]
            rows = rows.masked_fill(unused, 0)
            owner = packed.owner[rows].masked_fill(unused, packed.num_sequences)
        rank = torch.arange(len(rows), device=rows.device) - row_starts[owner]
        return cls(rows, packed.position[rows], owner, rank.clamp_(max=max(longest - 1, 0)), num, row_counts, longest)

    @property
    def num_sequences(self) -> int:
        return len(self.num)

    def table(self, values: Tensor, fill: float) -> Tensor:
        """[B + 1, longest]: the rows of a sequence side by side; the last line is of the unused."""
        table = values.new_full((self.num_sequences + 1, self.longest), fill)
        return table.index_put_((self.owner, self.rank), values)

    def best(self, scores: Tensor, counts: Tensor) -> Tensor:
        """bool [R]: the int64 [B] counts best of each sequence, lower positions first among equals."""
        return self._marked(scores, lambda ranked: self._places < counts[:, None])

    def above(self, scores: Tensor, threshold: float, at_least: int) -> Tensor:
        """bool [R]: those whose score is `threshold` or more, and the `at_least` best."""
        return self._marked(scores, lambda ranked: (ranked >= threshold) | (self._places < at_least))

    def bounded(self, scores: Tensor, entropies: Tensor, bound: float) -> Tensor:
        """bool [R]: the longest run of the best whose entropies sum to `bound` at most beside their largest."""

        def within(ranked: Tensor) -> Tensor:
            table = self.table(entropies, 0.0)[:-1].gather(1, self._order(scores))
            return table.cumsum(1) - table.cummax(1).values <= bound

        return self._marked(scores, within)

    @property
    def _places(self) -> Tensor:
        return torch.arange(self.longest, device=self.rows.device)

    def _order(self, scores: Tensor) -> Tensor:
        return self.table(scores, -math.inf)[:-1].argsort(dim=1, descending=True, stable=True)

    def _marked(self, scores: Tensor, rule) -> Tensor:
        """rule: ranked scores [B, longest] -> bool of that shape."""
        order = self._order(scores)
        kept = rule(self.table(scores, -math.inf)[:-1].gather(1, order))
        table = torch.zeros((self.num_sequences + 1, self.longest), dtype=torch.bool, device=scores.device)
        table[:-1].scatter_(1, order, kept)
        return table[self.owner, self.rank] & (self.owner < self.num_sequences)
