"""Holds the operators' results of two runs against each other, row by row: FAST, SLOW, SAME, AMBG.

    python -m benchmarks compare before.json after.json --fail-on-slow

A row's noise is half of what lies between its 20th and 80th percentile, as a share of its median; the band is the
larger noise of the two rows, at least 1 %. SAME: the medians differ by less than the band, which is no wider than 10 %.
FAST or SLOW: they differ by more, and the second run's p20 to p80 lies wholly below or above the first's. AMBG:
anything else. Times are those of the graph's replay where both have one, else of the cold run.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.operator_report import micro
from benchmarks.results import MalformedResult, read_rows
from benchmarks.rows import Row
from benchmarks.timing import Timing

LEAST_BAND, WIDEST_BAND = 0.01, 0.10
_STYLES = {"FAST": "green", "SLOW": "red", "AMBG": "yellow"}


@dataclass(frozen=True)
class Match:
    """A row of both runs: what it took in each, the second's time over the first's, the band, and the verdict."""

    row: Row
    way: str
    first: Timing
    second: Timing

    @property
    def ratio(self) -> float:
        return self.second.median / self.first.median

    @property
    def band(self) -> float:
        return max(LEAST_BAND, *((each.p80 - each.p20) / 2 / each.median for each in (self.first, self.second)))

    @property
    def verdict(self) -> str:
        if abs(self.ratio - 1) <= self.band:
            return "SAME" if self.band <= WIDEST_BAND else "AMBG"
        if self.second.p80 < self.first.p20:
            return "FAST"
        return "SLOW" if self.second.p20 > self.first.p80 else "AMBG"


@dataclass(frozen=True)
class Comparison:
    """`first`, `second`: rows that only one run timed."""

    matches: list[Match]
    first: list[Row]
    second: list[Row]

    @property
    def slow(self) -> bool:
        return any(match.verdict == "SLOW" for match in self.matches)


def compared(first: list[Row], second: list[Row]) -> Comparison:
    before, after = ({row.key: row for row in rows if row.timing} for rows in (first, second))
    common = [(row, after[key]) for key, row in before.items() if key in after]
    matches = []
    for one, other in common:
        way = "graph" if one.timings["graph"] and other.timings["graph"] else "cold"
        if one.timings[way] and other.timings[way]:
            matches.append(Match(other, way, one.timings[way], other.timings[way]))
    alone = (
        [row for key, row in rows.items() if key not in others] for rows, others in ((before, after), (after, before))
    )
    return Comparison(matches, *alone)


def show(found: Comparison, names: tuple[str, str], console: Console) -> None:
    if found.matches:
        console.print(_table(found.matches, names))
    for rows, name in zip((found.first, found.second), names, strict=True):
        for row in rows:
            console.print(escape(f"only timed in {name}: {' '.join(row.key)}"), highlight=False)
    counts = (
        f"{sum(match.verdict == word for match in found.matches)} {word}" for word in ("FAST", "SLOW", "SAME", "AMBG")
    )
    console.print(", ".join(counts), highlight=False)


def _table(matches: list[Match], names: tuple[str, str]) -> Table:
    table = Table(title=f"{names[0]} → {names[1]}", title_justify="left", title_style="bold")
    for name in ("operator", "case", "dtype", "variant", "way"):
        table.add_column(name, no_wrap=name != "variant")
    for name in ("before µs", "after µs", "time", "band"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for match in matches:
        row, style = match.row, _STYLES.get(match.verdict)
        words = row.operator, row.case, row.dtype, row.implementation, match.way
        times = micro(match.first.median), micro(match.second.median)
        table.add_row(*words, *times, f"{match.ratio - 1:+.1%}", f"±{match.band:.1%}", match.verdict, style=style)
    table.caption, table.caption_justify = "time: of the second over the first; band: of the p20–p80 of both", "left"
    return table


def differences(first: dict, second: dict) -> list[str]:
    """What the two runs do not share and times depend on, by name."""
    machines = first.get("machine") or {}, second.get("machine") or {}
    versions = first.get("versions") or {}, second.get("versions") or {}
    found = [(name, *(each.get(name) for each in machines)) for name in ("cpu", "cores", "threads", "gpu", "driver")]
    found += [(name, *(each.get(name) for each in versions)) for name in ("torch", "triton", "cuda")]
    return [f"{name} {one} and {other}" for name, one, other in found if one != other]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    try:
        (first, before), (second, after) = map(read_rows, options.files)
    except MalformedResult as error:
        return _refused(str(error))
    except OSError as error:
        return _refused(f"{error.filename}: {error.strerror}")
    found = compared(*([row for row in rows if row.side == "this"] for rows in (before, after)))
    if not found.matches:
        return _refused(f"{' and '.join(map(str, options.files))} have no timed row in common")
    console = Console()
    console.width = max(console.width, 120)
    if different := differences(first, second):
        console.print(escape(f"measured in different places: {'; '.join(different)}"), style="yellow", highlight=False)
    for path, content in zip(options.files, (first, second), strict=True):
        if content.get("partial"):
            console.print(escape(f"{path} is partial"), style="yellow", highlight=False)
    stems = tuple(path.stem for path in options.files)
    show(found, stems if len(set(stems)) == 2 else tuple(map(str, options.files)), console)
    return int(options.fail_on_slow and found.slow)


def _refused(why: str) -> int:
    """Another status than that of a row that is SLOW."""
    print(why, file=sys.stderr)
    return 2


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs=2, type=Path, metavar="RESULT.json", help="of python -m benchmarks run")
    parser.add_argument("--fail-on-slow", action="store_true", help="end with status 1 if a row is SLOW")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
