"""Rows of a benchmark: what was measured, the table on the terminal, and the JSON file."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import PARTS
from benchmarks.ceilings import Ceilings
from benchmarks.peers import HEAD_PEERS
from benchmarks.timing import Timing

SCHEMA = 1
BASELINE = HEAD_PEERS[0].name
WAYS = "cold", "warm", "graph"


@dataclass(frozen=True)
class Row:
    """One variant at one size. Times are None where it was not timed; `note` says why.

    kind         implementation, peer, part (of what the peers do) or ceiling
    cold, warm   with the last-level cache flushed before each run, and right after the same run
    graph        replay of a CUDA graph, cache flushed
    num_bytes    that the operator must move, and the FLOPs of its product, counted by hand
    law          the law check's verdict
    memory       peak bytes beyond the inputs
    ratios       for each way of timing, the time of each peer over this variant's
    """

    operator: str
    part: str
    variant: str
    kind: str
    device: str
    dtype: str
    hidden_size: int
    vocab_size: int
    num_rows: int
    num_bytes: int
    flops: int
    cold: Timing | None = None
    warm: Timing | None = None
    graph: Timing | None = None
    law: str | None = None
    memory: int | None = None
    note: str | None = None
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def way(self) -> str:
        """Of the timings, the one that is compared."""
        return "graph" if self.graph else "cold"

    @property
    def timing(self) -> Timing | None:
        return getattr(self, self.way)

    @property
    def seconds(self) -> float | None:
        return self.timing and self.timing.median

    def against(self, ceilings: Ceilings) -> dict[str, float | None]:
        """The floor that the ceilings predict, bytes and FLOPs per second, and their shares, 1 being all of it."""
        floor = ceilings.floor(self.num_bytes, self.flops)
        bandwidth, rate = (count / self.seconds if self.seconds else None for count in (self.num_bytes, self.flops))
        return {
            "floor": floor,
            "floor_share": floor / self.seconds if self.seconds else None,
            "bandwidth": bandwidth,
            "bandwidth_share": bandwidth / ceilings.bandwidth if self.seconds else None,
            "rate": rate,
            "rate_share": rate / ceilings.product if self.seconds else None,
            "ceiling_bandwidth": ceilings.bandwidth,
            "ceiling_rate": ceilings.product,
        }


_HEADLINE = "p20–p80, rates, shares and × published are of the graph's replay where there is one, else of the cold run"


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows of one size, `ratios` filled in for the implementations."""

    def ratios(row: Row, way: str) -> dict[str, float]:
        ours, peers = getattr(row, way), [peer for peer in rows if peer.kind == "peer" and getattr(peer, way)]
        return {peer.variant: getattr(peer, way).median / ours.median for peer in peers} if ours else {}

    def by_way(row: Row) -> dict[str, dict[str, float]]:
        found = {way: ratios(row, way) for way in WAYS} if row.kind == "implementation" else {}
        return {way: each for way, each in found.items() if each}

    return [replace(row, ratios=by_way(row)) for row in rows]


@dataclass
class Report:
    """Everything one command measured, each row with the ceilings it is held against; `partial` until all is there."""

    command: list[str]
    environment: dict
    partial: bool = True
    ceilings: list[Ceilings] = field(default_factory=list)
    rows: list[tuple[Row, Ceilings]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {
            "schema": SCHEMA,
            "partial": self.partial,
            "command": self.command,
            **self.environment,
            "failures": self.failures,
            "ceilings": [asdict(one) for one in self.ceilings],
            "rows": [asdict(row) | row.against(ceilings) for row, ceilings in self.rows],
        }

    def save(self, path: Path | None) -> None:
        """Written whole or not at all."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".part")
            unfinished.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")
            os.replace(unfinished, path)

    def show(self, console: Console) -> None:
        for ceilings in self.ceilings:
            console.print(
                f"ceilings, {ceilings.device} {ceilings.dtype}: {ceilings.bandwidth / 1e9:,.1f} GB/s "
                f"({ceilings.by} of {ceilings.num_bytes / 1e6:,.1f} MB), {ceilings.product / 1e9:,.0f} GFLOP/s",
                highlight=False,
            )
        for table in self.tables():
            console.print(table)
        for failure in self.failures:
            console.print(f"[red]{escape(failure)}[/red]")
        if self.partial:
            console.print("[yellow]partial: not everything asked for was measured[/yellow]")

    def tables(self) -> list[Table]:
        return [_table(list(group)) for _, group in groupby(self.rows, lambda pair: _title(pair[0]))]


def _title(row: Row) -> str:
    return f"{PARTS[row.part]}, {row.device} {row.dtype}, D = {row.hidden_size}, V = {row.vocab_size:,}"


def _table(pairs: list[tuple[Row, Ceilings]]) -> Table:
    ways = [way for way in WAYS if any(getattr(row, way) for row, _ in pairs)]
    table = Table(title=f"{pairs[0][0].operator}: {_title(pairs[0][0])}", title_justify="left", title_style="bold")
    table.add_column("R", justify="right")
    table.add_column("variant", no_wrap=True)
    for name in (*(f"{way} µs" for way in ways), "p20–p80", "floor µs", "% of it", "GB/s", "%", "GFLOP/s", "%",
                 "× published", *(f"× {way}" for way in ways), "MB"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("law and notes", overflow="fold", max_width=40)
    seen = {row.variant for row, _ in pairs if row.timing or row.law}
    absent = {row.variant: row.note for row, _ in pairs if row.variant not in seen}
    shown = [pair for pair in pairs if pair[0].variant in seen]
    for num_rows, group in groupby(shown, lambda pair: pair[0].num_rows):
        for row, ceilings in group:
            style = None if row.kind == "implementation" else "dim"
            table.add_row(f"{num_rows:,}", *_cells(row, ceilings, ways), style=style)
        table.add_section()
    notes = [f"×: the fastest peer's time over this one's; × published: that of {BASELINE}", _HEADLINE]
    table.caption = "\n".join(notes + [f"not timed: {name} ({note})" for name, note in absent.items()])
    table.caption_justify = "left"
    return table


def _cells(row: Row, ceilings: Ceilings, ways: list[str]) -> list[str]:
    against, ours, timing = row.against(ceilings), row.kind == "implementation", row.timing
    timings = [getattr(row, way) for way in ways]
    return [
        row.variant,
        *(_micro(each and each.median) for each in timings),
        f"{_micro(timing.p20)}–{_micro(timing.p80)}" if timing else "",
        _micro(against["floor"]) if ours else "",
        _percent(against["floor_share"]) if ours else "",
        _giga(against["bandwidth"], 1),
        _percent(against["bandwidth_share"]),
        _giga(against["rate"], 0) if row.flops else "",
        _percent(against["rate_share"]) if row.flops else "",
        f"{published:.2f}" if (published := row.ratios.get(row.way, {}).get(BASELINE)) else "",
        *(f"{min(row.ratios[way].values()):.2f}" if way in row.ratios else "" for way in ways),
        "" if row.memory is None else f"{row.memory / 1e6:,.1f}",
        "; ".join(filter(None, (row.law, row.note))),
    ]


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.1f}"


def _giga(rate: float | None, digits: int) -> str:
    return "" if rate is None else f"{rate / 1e9:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
