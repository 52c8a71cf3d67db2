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
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import liger
from benchmarks.base import Base, BaseError, checked_out
from benchmarks.cases import Point
from benchmarks.ceilings import Ceilings, measure
from benchmarks.compare import compared, show
from benchmarks.machine import command, describe
from benchmarks.operator_report import OperatorReport
from benchmarks.rows import Row, with_ratios
from benchmarks.selection import chosen_points, parse
from benchmarks.timing import Effort, Timing, cache_bytes
from benchmarks.trial import Settings, Timer, Trial, one_line
from benchmarks.worker import Worker

_BLOCKS = 2  # of each side, in turns, where there are two
_CEILING_SECONDS = 0.5  # at least, for each operation
_LEAST_WIDTH = 120  # of the table; a narrower terminal wraps its lines


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments, __doc__)
    torch.set_num_threads(options.threads)
    points = chosen_points(options)
    if options.list:
        print("\n".join(f"{point.operator} {point.name}" for point in points))
        return 0
    report = OperatorReport(command("benchmarks", ["run", *arguments]), describe(torch.device(options.device)))
    console = Console(stderr=True)
    console.width = max(console.width, _LEAST_WIDTH)
    try:
        with ExitStack() as stack:
            base = None
            if options.base:
                base = stack.enter_context(checked_out(options.base, cuda=options.device == "cuda"))
            bench = Bench(options, report, console, base)
            for dtype in options.dtype:
                bench.run(points, getattr(torch, dtype))
        report.partial = bool(report.failures)
    except KeyboardInterrupt:
        report.failures.append("interrupted")
    except TimeoutError as error:
        report.failures.append(str(error))
    except BaseError as error:
        if not report.rows:
            sys.exit(f"--base {options.base}: {error}")
        report.failures.append(f"--base {options.base}: {error}")
    finally:
        if report.rows or report.failures:
            save(report, options.out)
    report.show(console)
    if options.base:
        before, after = ([row for row, _ in report.rows if row.side == side] for side in ("base", "this"))
        show(compared(before, after), (options.base, "this"), console)
    return int(report.partial)


def save(report: OperatorReport, folder: Path | None) -> None:
    if folder is not None:
        report.save(folder / "operators.json")
        liger.write(folder / "operators.csv", report)


class Bench:
    """All cases of a command: of one side, in this process, or with a base of two, each in a process of its own."""

    def __init__(self, options: Namespace, report: OperatorReport, console: Console, base: Base | None):
        self.options, self.report, self.console, self.base = options, report, console, base
        self.device = torch.device(options.device)
        self.sides: dict[str, Timer | Worker] = {}
        self.largest: dict[tuple[str, str, str], int] = {}  # count of a part
        report.base = base and base.commit

    def run(self, points: list[Point], dtype: torch.dtype) -> None:
        ceilings = self.ceilings(dtype)
        settings = Settings(
            seconds=self.options.seconds,
            limit=self.options.limit,
            draws=self.options.draws,
            impl=self.options.impl,
            peers=self.options.peers and self.base is None,
            read=ceilings.by,
        )
        for point in points:
            part = point.operator, point.part, point.model
            self.largest[part] = max(point.count, self.largest.get(part, 0))
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

    def started(self, settings: Settings, stack: ExitStack) -> dict[str, Timer | Worker]:
        if self.base is None:
            return {"this": Timer(self.device, settings)}
        folders = {"base": self.base.packages, "this": None}
        workers = {side: Worker(folder, self.device, settings) for side, folder in folders.items()}
        return {side: stack.enter_context(worker) for side, worker in workers.items()}

    def time(self, point: Point, dtype: torch.dtype, ceilings: Ceilings) -> None:
        """Adds a row for every variant, timed or with the reason why not."""
        name = f"{point.operator} {point.name} {str(dtype).removeprefix('torch.')}"
        if time.monotonic() > self.options.deadline:
            raise TimeoutError(f"the budget of {self.options.budget:g} s was spent before {name}")
        self.say(name)
        try:
            trials = {side: timer.open(point, dtype) for side, timer in self.sides.items()}
            rows = list(self.rows(point, trials))
        except (RuntimeError, MemoryError) as error:
            self.report.failures.append(f"{name}: {one_line(error)}")
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

    def rows(self, point: Point, trials: dict[str, Trial | Worker]) -> Iterator[Row]:
        """Of all sides, which take turns in blocks where there are two."""
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

    def weighed(self, row: Row, point: Point, trial: Trial | Worker) -> Row:
        """With its memory, at the largest count of its part."""
        asked = self.options.memory and self.base is None and row.role in ("implementation", "peer")
        largest = point.count == self.largest[point.operator, point.part, point.model]
        return replace(row, memory=trial.weigh(row.implementation)) if asked and largest and row.seconds else row

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
