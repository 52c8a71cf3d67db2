"""Times whole sampling runs under schedules, side by side: is the time saved that the FLOPs say?

    python -m benchmarks.schedules --threads 2 --out results.json

The first schedule is what the others are compared with. All of them sample texts of the same length, one run after the
other in turn, so that a machine that becomes slow slows all; a round gives a saving for each schedule, and the table
the median of these with its 20th and 80th percentile. Its last column is the share of the FLOPs saved, head included,
that shows in time. Seconds predicted from a calibration, measured first, stand beside those that were taken. The table
goes to standard error, the JSON to the file.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import unmask
from benchmarks.arguments import count
from benchmarks.machine import command, describe
from benchmarks.timing import host_clock
from unmask.options import named_sources
from unmask.reveal import parse

_WIDTH = 140
DEFAULTS = "heavy", "heavy:75% light:25%", "light:12.5% heavy:75% light:12.5%", "light:25% heavy:50% light:25%", "light"


@dataclass(frozen=True)
class Row:
    """One schedule. Seconds of each round; savings are shares of the first schedule's time or FLOPs."""

    schedule: str
    seconds: list[float]
    saved: list[float]
    saved_flops: float
    saved_block_flops: float
    predicted_seconds: float

    @property
    def realised(self) -> float | None:
        """Time saved / FLOPs saved, head included; None for the first schedule."""
        return statistics.median(self.saved) / self.saved_flops if self.saved_flops else None

    def to_json(self) -> dict:
        return {**asdict(self), "realised": self.realised}


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    models = unmask.load_all(named_sources(options.model), dtype=options.dtype)
    samplers = {
        schedule: unmask.Sampler(models, schedule=schedule, reveal=parse(options.reveal), max_batch=options.max_batch)
        for schedule in options.schedule or DEFAULTS
    }
    load = os.getloadavg()[0]
    calibration = unmask.calibrate("cpu", next(iter(models.values())).dtype, again=True)
    plan = {"num_samples": options.num_samples, "length": options.length, "calibration": calibration}
    plans = {schedule: sampler.plan(**plan) for schedule, sampler in samplers.items()}
    seconds = _rounds(samplers, options)
    rows = _rows(plans, seconds)
    console = Console(stderr=True)
    console.width = max(console.width, _WIDTH)
    console.print(_table(rows, options))
    if options.out is not None:
        content = {
            "command": command("benchmarks.schedules", arguments),
            **describe(torch.device("cpu")),
            "load_before": load,
            "models": {name: asdict(model.spec) for name, model in models.items()},
            "rows": [row.to_json() for row in rows],
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _rounds(samplers: dict[str, unmask.Sampler], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each schedule in each round; the order is turned by one from round to round."""
    names, seconds = list(samplers), {schedule: [] for schedule in samplers}
    for name in names:
        samplers[name].sample(1, options.length)
    for turn in range(options.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(host_clock(partial(samplers[name].sample, options.num_samples, options.length)))
    return seconds


def _rows(plans: dict[str, unmask.Plan], seconds: dict[str, list[float]]) -> list[Row]:
    first, whole = next(iter(seconds.values())), next(iter(plans.values())).cost.total
    rows = []
    for schedule, plan in plans.items():
        saved = [1 - one / other for one, other in zip(seconds[schedule], first, strict=True)]
        total = plan.cost.total
        of_blocks = 1 - (total.total - total.head) / (whole.total - whole.head)
        row = Row(
            schedule,
            seconds[schedule],
            saved,
            1 - total.total / whole.total,
            of_blocks,
            plan.seconds.total,
        )
        rows.append(row)
    return rows


def _table(rows: list[Row], options: argparse.Namespace) -> Table:
    title = f"{options.num_samples} texts of {options.length} tokens, {options.reveal}, {options.dtype}"
    table = Table(title=title, header_style="bold", box=None)
    columns = "seconds", "predicted", "FLOPs saved", "without head", "time saved", "p20–p80", "time / FLOPs"
    table.add_column("schedule")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        low, _, _, high = statistics.quantiles(row.saved, n=5, method="inclusive")
        cells = [f"{statistics.median(row.seconds):.2f}", f"{row.predicted_seconds:.2f}", f"{row.saved_flops:.1%}"]
        cells += [f"{row.saved_block_flops:.1%}", f"{statistics.median(row.saved):.1%}", f"{low:.1%}–{high:.1%}"]
        table.add_row(row.schedule, *cells, "" if row.realised is None else f"{row.realised:.1%}")
    return table


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.schedules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", metavar="NAME=SOURCE", help="a denoiser; default: the bundled pair")
    defaults = ", ".join(DEFAULTS).replace("%", "%%")
    add("--schedule", action="append", metavar="SEGMENTS", help=f"once for each; default: {defaults}")
    add("--num-samples", "-n", type=count, default=16, help="texts of a run (default: 16)")
    add("--length", type=count, default=256, help="tokens of a text (default: 256)")
    add("--reveal", default="ancestral:256", help="default: ancestral:256")
    add("--max-batch", type=count, default=16, help="sequences of one network call (default: 16)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--rounds", type=count, default=5, help="runs of each schedule, at least 2 (default: 5)")
    add("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (default: torch's choice)")
    add("--out", type=Path, metavar="FILE.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for a spread, got {options.rounds}")
    return options


if __name__ == "__main__":
    sys.exit(main())
