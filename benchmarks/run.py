"""Times operators: every implementation that serves here, beside peers and this machine's measured ceilings.

    python -m benchmarks run --operator sample_head --device cpu --threads 2 --out runs/bench
    python -m benchmarks run --case 'attention mdlm-small' --base main

The table goes to standard error, operators.json and operators.csv (in the columns of Liger-Kernel's visualiser) to the
folder --out. An implementation that fails its check gets no speed.
"""

import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from rich.console import Console

from benchmarks import liger
from benchmarks.base import BaseError, checked_out
from benchmarks.cases import Point
from benchmarks.ceilings import Ceilings, measure
from benchmarks.compare import compared, show
from benchmarks.machine import command, describe
from benchmarks.operator_report import OperatorReport
from benchmarks.rows import Row, with_ratios
from benchmarks.selection import chosen_points, parse
from benchmarks.timing import Effort, Timing, cache_bytes
from benchmarks.trial import Settings, Trial, Timer
from benchmarks.worker import Worker

_BLOCKS = 2  # of each side, in turns, where there are two
_CEILING_SECONDS = 0.5  # at least, for each operation
_LEAST_WIDTH = 120  # of the table; a narrower terminal wraps its lines


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    points = chosen_points(options)
    if options.list:
        print("\n".join(f"{point.operator} {point.name}" for point in points))
        return 0
    device = torch.device(options.device)
    report = OperatorReport(command("benchmarks", ["run", *arguments]), describe(device))
    console = Console(stderr=True)
    console.width = max(console.width, _LEAST_WIDTH)
    try:
        with ExitStack() as stack:
            bench = Bench(options, device, report, console, stack)
            for dtype in options.dtype:
                bench.run(points, getattr(torch, dtype))
    except KeyboardInterrupt:
        console.print("interrupted")
        report.failures.append("interrupted")
    except BaseError as error:
        sys.exit(f"--base {options.base}: {error}")
    finally:
        report.partial = bool(report.failures)
        save(report, options)
    report.show(console)
    if options.base is not None:
        sides = defaultdict(list)
        for row, _ in report.rows:
            sides[row.side].append(row)
        show(compared(sides["base"], sides["this"]), (options.base, "this"), console)
    return int(report.partial)


def save(report: OperatorReport, options: Namespace) -> None:
    if options.out is not None:
        report.save(options.out / "operators.json")
        liger.write(options.out / "operators.csv", report)


class Bench:
    """All cases of a command: of one side, in this process, or with --base of two, each in a process of its own."""

    def __init__(
        self,
        options: Namespace,
        device: torch.device,
        report: OperatorReport,
        console: Console,
        stack: ExitStack,
    ):
        self.options, self.device, self.report, self.console = options, device, report, console
        self.sides: dict[str, Timer | Worker] = {}
        self.largest: dict[tuple[str, str, str], int] = defaultdict(int)
        self.stack = stack

    def run(self, points: list[Point], dtype: torch.dtype) -> None:
        ceilings = self.ceilings(dtype)
        settings = Settings(
            seconds=self.options.seconds,
            limit=self.options.limit,
            draws=self.options.draws,
            impl=self.options.impl,
            peers=self.options.peers and self.options.base is None,
            read=ceilings.by,
        )
        for point in points:
            known = point.operator, point.part, point.model
            self.largest[known] = max(self.largest[known], point.count)
        with ExitStack() as stack:
            self.sides = self.started(settings, stack)
            for point in points:
                self.time(point, dtype, ceilings)

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Of a read that no cache holds, and of a product in this dtype."""
        self.say(f"ceilings of this machine in {dtype}")
        effort = Effort(seconds=max(_CEILING_SECONDS, self.options.seconds))
        found = measure(self.device, dtype, 4 * cache_bytes(self.device), effort)
        self.report.ceilings.append(found)
        return found

    def started(self, settings: Settings, stack: ExitStack) -> dict[str, "Timer | Worker"]:
        if self.options.base is None:
            return {"this": Timer(self.device, settings)}
        if self.report.base is None:
            self.say(f"checking out {self.options.base}")
            self.base = self.stack.enter_context(checked_out(self.options.base))
            self.report.base = self.base.commit
        folders = {"base": self.base.packages, "this": None}
        workers = {side: Worker(folder, self.device, settings) for side, folder in folders.items()}
        return {side: stack.enter_context(worker) for side, worker in workers.items()}

    def time(self, point: Point, dtype: torch.dtype, ceilings: Ceilings) -> None:
        """Adds a row for every variant, timed or with the reason why not."""
        name = f"{point.operator} {point.name} {str(dtype).removeprefix('torch.')}"
        if time.monotonic() > self.options.deadline:
            budget = f"the budget of {self.options.budget:g} s was spent before {name}"
            if budget.split(" before ")[0] not in " ".join(self.report.failures):
                self.report.failures.append(budget)
            return
        self.say(name)
        try:
            trials = {side: timer.open(point, dtype) for side, timer in self.sides.items()}
            rows = list(self.rows(point, trials))
        except (RuntimeError, MemoryError) as error:
            self.report.failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            return
        self.report.failures += [
            f"{name}: {row.implementation} fails its check: {row.law}"
            for row in rows
            if row.role == "implementation" and row.law_passed is False
        ]
        reads = [row.num_bytes / row.seconds for row in rows if row.role == "ceiling" and row.seconds]
        ceilings = replace(ceilings, bandwidth=max([ceilings.bandwidth, *reads]))
        self.report.rows += [(row, ceilings) for row in rows]
        if self.options.out is not None:
            self.report.save(self.options.out / "operators.json")

    def rows(self, point: Point, trials: dict[str, Trial]) -> Iterator[Row]:
        blocks = _BLOCKS if len(trials) > 1 else 1
        found = {side: defaultdict(lambda: defaultdict(list)) for side in trials}
        notes: dict[str, dict[str, str]] = defaultdict(dict)
        for _ in range(blocks):
            for side, trial in trials.items():
                seconds, said = trial.measure(1 / blocks)
                notes[side] |= said
                for name, ways in seconds.items():
                    for way, each in ways.items():
                        found[side][name][way] += each
        for side, trial in trials.items():
            rows = []
            for name, row in trial.rows.items():
                timings = {way: Timing.of(each) for way, each in found[side][name].items()}
                row = replace(row, side=side, timings=row.timings | timings)
                rows.append(row.noted(notes[side][name]) if name in notes[side] else row)
            for row in with_ratios(rows):
                yield self.weighed(row, point, trial)

    def weighed(self, row: Row, point: Point, trial: Trial) -> Row:
        """With its memory, at the largest count of its part."""
        asked = self.options.memory and self.options.base is None and row.role in ("implementation", "peer")
        largest = point.count == self.largest[point.operator, point.part, point.model]
        return replace(row, memory=trial.weigh(row.implementation)) if asked and largest and row.seconds else row

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
