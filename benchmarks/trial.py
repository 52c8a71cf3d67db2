"""One case on trial: who may be timed, then the seconds of all of them, in turns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from benchmarks import memory
from benchmarks.cases import Case, Point, family
from benchmarks.rows import Row
from benchmarks.timing import Effort, Flush, Run, capture, clock, take_turns
from benchmarks.variants import Variant, beside, implementations

_NEW_LINE = "\n"
_GRAPH_BELOW = 2e-3  # seconds; in a longer run the launches do not show

Seconds = dict[str, dict[str, list[float]]]  # by variant and way of timing


@dataclass(frozen=True)
class Settings:
    """How every case is timed.

    seconds  given to a variant, in each way of timing; limit: a variant is left out where one run would take longer
    draws    of the law check
    impl     names of the implementations that are timed; None: all that serve
    peers    whether what is no implementation is timed too; read: the fastest operation that reads a CPU's memory
    """

    seconds: float = 0.5
    limit: float = 1.0
    draws: int = 50_000
    impl: frozenset[str] | None = None
    peers: bool = True
    read: str = "sum"


class Timer:
    """Times the cases of one device; remembers what a variant took, to leave out what would take too long."""

    def __init__(self, device: torch.device, settings: Settings):
        self.device, self.settings = device, settings
        self.expected: dict[tuple, float] = {}  # seconds of a row or sequence

    @cached_property
    def flush(self) -> Flush:
        return Flush(self.device)

    def open(self, point: Point, dtype: torch.dtype) -> "Trial":
        return Trial(self, point, dtype)


class Trial:
    """A case with its variants: `rows` of all of them, `admitted` those that may be timed."""

    def __init__(self, timer: Timer, point: Point, dtype: torch.dtype):
        self.timer, self.point, self.device = timer, point, timer.device
        self.case: Case = point.prepare(dtype, timer.device)
        self.tiny: Case = point.tiny().prepare(dtype, timer.device)
        settings = timer.settings
        variants = implementations(point.operator, settings.impl)
        if settings.peers:
            variants += beside(point.operator, point.part, self.device.type, settings.read)
        self.rows: dict[str, Row] = {}
        self.admitted: dict[str, Variant] = {}
        for variant in variants:
            self.rows[variant.name] = self.admit(variant)

    def admit(self, variant: Variant) -> Row:
        """The variant's row; it is timed if nothing speaks against it."""
        row = self.row(variant)
        if variant.lacks:
            return row.noted(variant.lacks)
        expected = self.timer.expected.get(self.known(variant.name), 0) * self.point.count
        if expected > self.timer.settings.limit:
            return row.noted(f"left out: would take up to {expected:.1f} s")
        try:
            verdict = variant.check and variant.check(self.case, self.timer.settings.draws)
        except (RuntimeError, ValueError) as error:
            return row.noted(one_line(error))
        if verdict:
            row = replace(row, law=verdict.detail, law_passed=verdict.passed)
            if not verdict.passed and variant.role == "implementation":
                return row.noted("so its speed is not shown")
        self.admitted[variant.name] = variant
        return row

    def known(self, name: str) -> tuple:
        return self.point.operator, self.point.part, self.point.model, self.case.dtype, name

    def row(self, variant: Variant) -> Row:
        num_bytes, flops = variant.moved(self.case)
        return Row(
            operator=self.point.operator,
            case=self.point.name,
            part=self.point.part,
            model=self.point.model,
            unit=family(self.point.operator).unit,
            count=self.point.count,
            implementation=variant.name,
            role=variant.role,
            device=self.device.type,
            dtype=str(self.case.dtype).removeprefix("torch."),
            shape=self.case.sizes,
            num_bytes=num_bytes,
            flops=flops,
        )

    def measure(self, share: float = 1.0) -> tuple[Seconds, dict[str, str]]:
        """Seconds of each run, "cold", "warm" and on a GPU "graph", in this share of the time that is given; and notes
        of variants of which no graph can be captured."""
        effort = Effort(seconds=self.timer.settings.seconds * share)
        runs = {name: variant.bind(self.case) for name, variant in self.admitted.items()}
        rehearsals = {name: variant.bind(self.tiny) for name, variant in self.admitted.items()}

        def cool(name: str) -> None:
            """Data out of the cache; on a CPU, whose flush drives out code too, that back into it."""
            self.timer.flush()
            if self.device.type == "cpu":
                rehearsals[name]()

        timed = clock(self.device)
        found = {
            "cold": take_turns(runs, timed, effort, cool),
            "warm": take_turns(runs, timed, effort, lambda name: runs[name]()),
        }
        quick = {name: run for name, run in runs.items() if min(found["warm"][name]) < _GRAPH_BELOW}
        replays, notes = captured(quick) if self.device.type == "cuda" else ({}, {})
        found["graph"] = take_turns(replays, timed, effort, cool)
        for name, seconds in found["cold"].items():
            self.timer.expected[self.known(name)] = min(seconds) / self.point.count
        return {name: {way: each[name] for way, each in found.items() if name in each} for name in runs}, notes

    def weigh(self, name: str) -> int | None:
        """Peak bytes beyond the inputs."""
        if self.device.type == "cpu":
            return memory.on_cpu(self.point, self.case.dtype, name)
        return memory.on_gpu(self.admitted[name].bind(self.case))


def captured(runs: dict[str, Run], capture: Callable[[Run], Run] = capture) -> tuple[dict[str, Run], dict[str, str]]:
    """Replays of the runs as CUDA graphs, and why there is none of the others."""
    replays, notes = {}, {}
    for name, run in runs.items():
        try:
            replays[name] = capture(run)
        except RuntimeError as error:
            notes[name] = f"no graph: {str(error).partition(_NEW_LINE)[0]}"
    return replays, notes


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(_NEW_LINE)[0]}"
