"""The seam between the sampling loop and a network."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.kernels import Offsets
from unmask.spans import SILENT, Spans
from unmask.work import Flops, Load, Work
from unmask.workspace import Workspace


@dataclass(frozen=True)
class DenoiserSpec:
    """What the sampler must know of a network.

    `shift`: the hidden row of position i - 1 predicts position i (and position 0 is predicted by its own row), as in
    models converted from autoregressive ones. `time_conditioned`: the network reads `Batch.mask_rate`. `tokenizer`: a
    fingerprint of the tokenizer, None when there is none. `num_parameters` counts shared tensors once. `num_kv_heads`:
    heads of keys and values, each shared by consecutive query heads; None: num_heads. `head_dim`: columns of a head;
    None: hidden_size / num_heads.
    """

    family: str
    vocab_size: int
    mask_id: int
    hidden_size: int
    num_blocks: int
    num_heads: int
    intermediate_size: int
    max_length: int
    shift: bool = False
    time_conditioned: bool = False
    tokenizer: str | None = None
    num_parameters: int = 0
    num_kv_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "num_heads", "max_length", "num_kv_heads", "head_dim"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be positive, got {value}")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask_id must be in [0, vocab_size = {self.vocab_size}), got {self.mask_id}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads = {self.num_heads}, got {self.hidden_size}")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key heads, columns of a head)."""
        return self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim or self.hidden_size // self.num_heads


class Span(NamedTuple):
    """Neighbouring sequences of a batch with equal length and equal number of queries: they make a dense view."""

    sequences: slice
    queries: slice
    keys: slice

    @property
    def num_sequences(self) -> int:
        return self.sequences.stop - self.sequences.start


def spans(lengths: tuple[int, ...], counts: tuple[int, ...]) -> list[Span]:
    """Cut a packed batch into `Span`s. Sequence i has `lengths[i]` keys and `counts[i]` queries."""
    found, sequence, query, key = [], 0, 0, 0
    for (length, count), group in groupby(zip(lengths, counts, strict=True)):
        n = sum(1 for _ in group)
        found.append(Span(slice(sequence, sequence + n), slice(query, query + n * count), slice(key, key + n * length)))
        sequence, query, key = sequence + n, query + n * count, key + n * length
    return found


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one network call: sequences back to back, no padding.

    tokens: int64 [T]. lengths: of each sequence, summing to T. rows: int64 [R], flat indices into `tokens` of the
    positions to predict, ascending, grouped by sequence. row_counts: rows of each sequence, summing to R.
    mask_rate: float32 [B] in (0, 1], read by time-conditioned denoisers only. row_positions: int64 [R], where each of
    `rows` stands in its own sequence; derived when left out. spans: who is told of the blocks of the call as they run.
    context: keys and values of the rest of each sequence, where the batch holds a part of its tokens only; for a
    denoiser that is `cacheable`.

    A denoiser that is `capturable` may get `Offsets` for lengths and row_counts, whose values only the device knows:
    T and R are then places for tokens and rows, the last of which may be unused. Unused tokens belong to no sequence;
    unused rows are 0, and nobody looks at what is predicted there.
    """

    tokens: Tensor
    lengths: tuple[int, ...] | Offsets
    rows: Tensor
    row_counts: tuple[int, ...] | Offsets
    mask_rate: Tensor
    row_positions: Tensor | None = None
    spans: Spans = SILENT
    context: object | None = None

    def __post_init__(self):
        num, num_counted = (
            len(x.starts) - 1 if isinstance(x, Offsets) else len(x) for x in (self.lengths, self.row_counts)
        )
        if num_counted != num or self.mask_rate.shape != (num,):
            raise ValueError(
                f"lengths, row_counts and mask_rate must describe the same sequences, got {num}, "
                f"{num_counted} and shape {list(self.mask_rate.shape)}"
            )
        for name, flat, sizes in (("tokens", self.tokens, self.lengths), ("rows", self.rows, self.row_counts)):
            total = flat.numel() if isinstance(sizes, Offsets) else sum(sizes)
            if flat.dtype != torch.int64 or flat.shape != (total,):
                raise ValueError(f"{name} must be int64 [{total}], got {flat.dtype} {list(flat.shape)}")
        if self.row_positions is None:
            if isinstance(self.lengths, Offsets) or isinstance(self.row_counts, Offsets):
                raise ValueError("row_positions must be given where only the device knows lengths, got None")
            object.__setattr__(self, "row_positions", self.rows - self._first_rows())

    @property
    def longest(self) -> int:
        """No sequence has more tokens."""
        return self.lengths.longest if isinstance(self.lengths, Offsets) else max(self.lengths, default=0)

    @cached_property
    def token_spans(self) -> list[Span]:
        """Runs in which every position is queried."""
        return spans(self.lengths, self.lengths)

    def shifted_rows(self) -> Tensor:
        """int64 [R]: the hidden row that predicts each of `rows` when a model's `shift` is set (see `DenoiserSpec`)."""
        return self.rows - (self.row_positions > 0).long()

    def _first_rows(self) -> Tensor:
        """int64 [R]: the first position of the sequence that each of `rows` belongs to."""
        starts = torch.tensor([0, *accumulate(self.lengths)][:-1])
        return torch.repeat_interleave(starts, torch.tensor(self.row_counts)).to(self.rows.device)


@dataclass(frozen=True, eq=False)
class Head:
    """hidden @ weight.T + bias are the logits. weight [V, D]; bias [V] or None.

    `weight` None: the hidden rows are the logits themselves, D = V, and there is no bias.
    """

    weight: Tensor | None
    bias: Tensor | None = None


class Denoiser(ABC):
    """A network for masked positions, split where the sampler needs it: hidden rows here, the head in a kernel."""

    spec: DenoiserSpec
    head: Head
    tokenizer: Tokenizer | None
    name: str
    device: torch.device = torch.device("cpu")

    @property
    def capturable(self) -> bool:
        """Whether `hidden` takes `Offsets` here and never waits for the device, so that a CUDA graph can replay it."""
        return False

    @property
    def cacheable(self) -> bool:
        """Whether `hidden` takes a batch's `context`."""
        return False

    @abstractmethod
    def buffers(self, max_tokens: int, max_rows: int, max_batch: int) -> dict[str, tuple[int, torch.dtype]]:
        """What `hidden` asks of a `Workspace` for batches within these limits: name -> (elements, dtype)."""

    @abstractmethod
    def hidden(self, batch: Batch, workspace: Workspace) -> Tensor:
        """Rows [R, D] after the final norm, in the order of `batch.rows`; valid until the next call."""

    @abstractmethod
    def flops(self, length: int, num_rows: int) -> Flops:
        """Cost of one network call for one sequence of `length` tokens of which `num_rows` are predicted."""

    def work(self, load: Load) -> Work | None:
        """The operations of a network call with this load, its head included; None where they are not known.

        The numbers of `load` may be arrays, one element per call; then the sizes of the operations are arrays too.
        """
        return None

    def chunks(self, batch: Batch, workspace: Workspace) -> Iterator[tuple[slice, Tensor]]:
        """The hidden rows piece by piece, each with the slice of the batch's rows that it covers, in order."""
        yield slice(0, len(batch.rows)), self.hidden(batch, workspace)


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's JSON as "sha256:" and 12 hex digits; equal for equal files."""
    canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()[:12]


class LogitsDenoiser(Denoiser):
    """A model that can only return logits: works everywhere, and computes more than is needed.

    `logits`: tokens int64 [B, L] -> logits [B, L, V]; with `spec.time_conditioned` it is called with
    (tokens, mask_rate float32 [B]). Its head is the identity (`Head(None)`). `chunks` bounds the memory: it calls the
    model with as many equally long sequences as keep its logits within `max_bytes` of fp32 (at least one sequence),
    and no two chunks are alive at once unless the caller keeps them. `hidden` holds all R rows [R, V].
    """

    def __init__(
        self,
        logits: Callable[..., Tensor],
        spec: DenoiserSpec,
        *,
        tokenizer: Tokenizer | None = None,
        name: str = "logits",
        device: torch.device | str = "cpu",
        max_bytes: int = 256 << 20,
    ):
        if tokenizer is not None and spec.tokenizer is None:
            spec = replace(spec, tokenizer=fingerprint(tokenizer))
        self.logits, self.spec, self.tokenizer, self.name, self.max_bytes = logits, spec, tokenizer, name, max_bytes
        self.device = torch.device(device)
        self.head = Head(None)

    def buffers(self, max_tokens: int, max_rows: int, max_batch: int) -> dict[str, tuple[int, torch.dtype]]:
        """Nothing: the wrapped model allocates its own logits."""
        return {}

    def hidden(self, batch: Batch, workspace: Workspace) -> Tensor:
        pieces = [rows for _, rows in self.chunks(batch, workspace)]
        return torch.cat(pieces) if pieces else torch.empty(0, self.spec.vocab_size, device=batch.rows.device)

    @torch.no_grad()
    def chunks(self, batch: Batch, workspace: Workspace) -> Iterator[tuple[slice, Tensor]]:
        sources = batch.shifted_rows() if self.spec.shift else batch.rows
        row_ends = [0, *accumulate(batch.row_counts)]
        for span in batch.token_spans:
            length = batch.lengths[span.sequences.start]
            step = max(1, self.max_bytes // (4 * self.spec.vocab_size * length))
            for first in range(span.sequences.start, span.sequences.stop, step):
                last = min(first + step, span.sequences.stop)
                start = span.keys.start + (first - span.sequences.start) * length
                rows = slice(row_ends[first], row_ends[last])
                if rows.start < rows.stop:
                    tokens = batch.tokens[start : start + (last - first) * length].view(-1, length)
                    # Not bound to a name, which would keep it alive beside the next one.
                    yield rows, self._rows(tokens, batch.mask_rate[first:last], sources[rows] - start)

    def _rows(self, tokens: Tensor, mask_rate: Tensor, rows: Tensor) -> Tensor:
        """Logits [rows, V] of some of the positions of tokens [B, L]."""
        logits = self.logits(tokens, mask_rate) if self.spec.time_conditioned else self.logits(tokens)
        expected = (*tokens.shape, self.spec.vocab_size)
        if logits.shape != expected:
            raise ValueError(f"the logits of {self.name!r} must be {list(expected)}, got {list(logits.shape)}")
        return logits.reshape(-1, self.spec.vocab_size)[rows]

    def flops(self, length: int, num_rows: int) -> Flops:
        """An estimate, as nothing is known of the model: two operations for each parameter and position.

        It tells no seconds, so `work` is None: how well a foreign model uses the machine is not known either.
        """
        return Flops(blocks=2 * self.spec.num_parameters * length, attention=0, head=0)


def check_compatible(denoisers: Mapping[str, Denoiser]) -> None:
    """Raise ValueError unless all denoisers agree on what a token id means (vocabulary size, mask id and tokenizer) and
    live on one device.

    A denoiser without a tokenizer agrees with any tokenizer.
    """
    for field in ("vocab_size", "mask_id", "tokenizer", "device"):
        values = ((name, getattr(d if field == "device" else d.spec, field)) for name, d in denoisers.items())
        known = [(name, value) for name, value in values if value is not None]
        for name, value in known[1:]:
            if value != known[0][1]:
                raise ValueError(
                    f"models of one run must share {field}, got {known[0][1]!r} for {known[0][0]!r} "
                    f"and {value!r} for {name!r}"
                )
