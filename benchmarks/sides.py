"""The two sides of the step benchmark, ours and the published sampler, asked the same questions."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import SEED
from benchmarks.network import Network, Pass, our_passes, published_bytes, published_passes
from benchmarks.peers.mdlm import Published
from benchmarks.ticks import OneTick, tick_seconds
from benchmarks.timing import Run, clock, host_clock
from benchmarks.trajectory import expected_published_calls, published_seconds, rows_per_event
from unmask import Ancestral, Sampler
from unmask.models.dit import DiT
from unmask.plan import Plan


class Step(NamedTuple):
    """`split`: runs it once and tells the seconds of its parts, on a CPU."""

    run: Run
    split: Callable[[], dict[str, float]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Side(ABC):
    """`dtype`: that of the products. `checkout`: of the published sampler, for a process of its own."""

    network: Network
    dtype: torch.dtype
    num_steps: int
    checkout: Path | None = None
    name: ClassVar[str]
    kind: ClassVar[str]

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def usual_rows(self) -> int:
        """Positions that an event reveals in a sequence, rounded up."""
        return math.ceil(rows_per_event(self.num_steps, self.network.length))

    @abstractmethod
    def passes(self, batch: int, num_rows: int) -> list[Pass]:
        """Of a step that reveals `num_rows` in all."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Step:
        """One step of half-masked sequences [B, L] in which the network runs."""

    @abstractmethod
    def calls(self, batch: int) -> tuple[float, str | None]:
        """Network calls of a whole run of `batch` sequences, and what is to be said of them."""

    @abstractmethod
    def seconds(self, tokens: Tensor, count: int) -> float:
        """Of a step, the mean of some consecutive ones of a run of as many sequences, or of all where that is quick."""

    @abstractmethod
    def total(self, tokens: Tensor, calls: float, seconds: float) -> float:
        """Seconds of the whole run, from those of a network call."""

    @abstractmethod
    def predicted_memory(self, batch: int) -> int:
        """Bytes beyond the weights."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Ours(Side):
    model: DiT
    name: ClassVar[str] = "unmask"
    kind: ClassVar[str] = "implementation"

    def passes(self, batch: int, num_rows: int) -> list[Pass]:
        return our_passes(self.network, self.dtype.itemsize, batch, num_rows)

    def step(self, tokens: Tensor) -> Step:
        tick = OneTick(self.model, tokens, self.usual_rows)
        return Step(tick, tick.split)

    def sampler(self, batch: int) -> Sampler:
        return Sampler(self.model, reveal=Ancestral(self.num_steps), max_batch=batch)

    def plan(self, batch: int) -> Plan:
        return self.sampler(batch).plan(batch, self.network.length, seed=SEED)

    def calls(self, batch: int) -> tuple[float, str]:
        plan = self.plan(batch)
        note = f"{plan.events_per_sequence:.1f} events each, ticks {plan.occupancy:.1%} full"
        return plan.num_ticks, note

    def seconds(self, tokens: Tensor, count: int) -> float:
        (batch, length), sampler = tokens.shape, self.sampler(len(tokens))
        if tokens.is_cuda:  # the host runs ahead of its ticks and captures the first ones, but a whole run is quick
            return host_clock(partial(sampler.sample, batch, length, seed=SEED)) / self.plan(batch).num_ticks
        return statistics.mean(tick_seconds(sampler, batch, length, count))

    def total(self, tokens: Tensor, calls: float, seconds: float) -> float:
        return calls * seconds

    def predicted_memory(self, batch: int) -> int:
        return self.plan(batch).peak_bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class Theirs(Side):
    """`dtype` bf16 stands for the published setting: fp32 weights, and autocast."""

    published: Published
    name: ClassVar[str] = "published"
    kind: ClassVar[str] = "peer"

    @property
    def narrow(self) -> bool:
        return self.dtype is torch.bfloat16

    def passes(self, batch: int, num_rows: int) -> list[Pass]:
        return published_passes(self.network, self.dtype.itemsize, batch)

    def step(self, tokens: Tensor) -> Step:
        def run() -> bool:
            _, after = self.published.step(tokens, self.num_steps, self.narrow)
            return torch.allclose(after, tokens)  # decides whether p(x0) is kept

        return Step(run, partial(self.published.split, run))

    def calls(self, batch: int) -> tuple[float, None]:
        return expected_published_calls(self.num_steps, self.network.length, batch), None

    def seconds(self, tokens: Tensor, count: int) -> float:
        middle = self.num_steps // 2
        return statistics.mean(self.published.steps(tokens, self.num_steps, middle, count, self.narrow))

    def total(self, tokens: Tensor, calls: float, seconds: float) -> float:
        timed = clock(tokens.device)
        p_x0, _ = self.published.step(tokens, self.num_steps, self.narrow)
        cached = timed(partial(self.published.step, tokens, self.num_steps, self.narrow, p_x0))
        del p_x0
        last = timed(partial(self.published.last, tokens, self.narrow))
        return published_seconds(self.num_steps, calls, seconds, cached, last)

    def predicted_memory(self, batch: int) -> int:
        return published_bytes(self.network, self.dtype.itemsize, batch)
