"""Our side of a step: one tick by itself, and the first ticks of a run."""

import time
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.cases import SEED
from unmask import Batch, Sampler
from unmask.kernels import HeadSample, sample_head
from unmask.kernels.offsets import Counts, Offsets
from unmask.models.dit import DiT
from unmask.progress import Progress
from unmask.run import Run, drawable
from unmask.timeline import Tick
from unmask.workspace import Workspace


class OneTick:
    """Hidden rows and tokens of `num_rows` masked positions, spread over each of the sequences `tokens` [B, L]."""

    def __init__(self, model: DiT, tokens: Tensor, num_rows: int):
        self.model, (num_sequences, length) = model, tokens.shape
        masked = [(sequence == model.spec.mask_id).nonzero().flatten() for sequence in tokens]
        picked = torch.stack([each[torch.linspace(0, len(each) - 1, num_rows).long()] for each in masked])
        owner = torch.arange(num_sequences, device=tokens.device)[:, None].expand_as(picked)
        self.keys = torch.stack([owner, picked, torch.zeros_like(picked)], -1).view(-1, 3)
        self.batch = Batch(
            tokens=tokens.flatten(),
            lengths=_counts(length, num_sequences, tokens.device),
            rows=(owner * length + picked).flatten(),
            row_counts=_counts(num_rows, num_sequences, tokens.device),
            mask_rate=torch.full((num_sequences,), 0.5, device=tokens.device),
            row_positions=picked.flatten(),
        )
        self.workspace = Workspace([model.buffers(tokens.numel(), picked.numel(), num_sequences)], model.device)
        self.bias = drawable(model)

    def __call__(self) -> HeadSample:
        return self.draw(self.model.hidden(self.batch, self.workspace))

    def draw(self, hidden: Tensor) -> HeadSample:
        check = self.model.device.type == "cpu"  # on a GPU it would wait for the device
        options = {"keys": self.keys, "seed": SEED, "want": ("logprob",), "check": check}
        return sample_head(hidden, self.model.head.weight, self.bias, **options)

    def log_probs(self) -> Tensor:
        """log p(x0 | tokens) of the rows, fp32 [R, V] on the CPU; the mask id has none."""
        hidden, head = self.model.hidden(self.batch, self.workspace).cpu(), self.model.head
        return (hidden.float() @ head.weight.cpu().float().T + self.bias.cpu()).log_softmax(-1)

    def split(self) -> dict[str, float]:
        """Seconds of the two parts on a CPU."""
        begin = time.perf_counter()
        hidden = self.model.hidden(self.batch, self.workspace)
        between = time.perf_counter()
        self.draw(hidden)
        return {"body": between - begin, "head and sampling": time.perf_counter() - between}


def _counts(size: int, num_sequences: int, device: torch.device) -> Counts:
    """As a run gives them: on a GPU known to the device only, so that a CUDA graph can replay the tick."""
    if device.type == "cpu":
        return (size,) * num_sequences
    return Offsets(size * torch.arange(num_sequences + 1, dtype=torch.int32, device=device), size)


class _Enough(Exception):
    """Ends a run before its time."""


class _Stamps(Progress):
    """The times at which the first ticks of a run end."""

    def __init__(self, count: int):
        self.count, self.seconds = count, []

    def update(self, run: Run, tick: Tick) -> None:
        self.seconds.append(time.perf_counter())
        if len(self.seconds) == self.count:
            raise _Enough


def tick_seconds(sampler: Sampler, num_sequences: int, length: int, count: int) -> list[float]:
    """Of consecutive ticks of a run on a CPU, all between them included; the first, which touches new memory, is not
    among them. How many positions an event reveals has the same law at all times, so the first ones stand for all."""
    stamps = _Stamps(count + 1)
    with suppress(_Enough):
        sampler.sample(num_sequences, length, seed=SEED, progress=stamps)
    return [after - before for before, after in pairwise(stamps.seconds)]
