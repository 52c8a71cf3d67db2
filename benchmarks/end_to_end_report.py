"""What whole runs took: rows, a table on the terminal, and a JSON file."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.protocol import Protocol, middle
from benchmarks.workloads import Size
from unmask.files import replace_whole

SCHEMA = 1


@dataclass(eq=False)
class Variant:
    """A sampler in a workload.

    reveal        our policy of its law
    sequences     of the workload that a run samples
    reveals       positions of each that it reveals
    law           what the check of its law found, and how it departs from the policy's
    logits_bytes  of the widest tensor of logits that it stores
    ours          what it is compared with, None for ours
    nfe           network calls per sequence of the workload, known from the first run on
    seconds       of each timed run
    """

    name: str
    reveal: str
    sequences: int
    reveals: int
    law: str
    law_passed: bool
    logits_bytes: int
    ours: "Variant | None" = None
    nfe: float | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """The variants of one workload and what they were asked for."""

    workload: str
    device: str
    dtype: str
    size: Size
    vocab_size: int
    variants: list[Variant] = field(default_factory=list)

    def seconds(self, variant: Variant) -> list[float]:
        """Of the whole workload, from each run of the part that the variant runs."""
        share = variant.sequences / self.size.batch * variant.reveals / self.size.length
        return [seconds / share for seconds in variant.seconds]


@dataclass
class EndToEndReport:
    """Everything one command measured; `partial` until all is there."""

    command: list[str]
    environment: dict
    protocol: Protocol
    partial: bool = True
    sections: list[Section] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {
            "kind": "peers",
            "schema": SCHEMA,
            "partial": self.partial,
            "command": self.command,
            **self.environment,
            "protocol": {"name": self.protocol.name, "warmups": self.protocol.warmups, "bounds": self.protocol.bounds},
            "rows": [row for section in self.sections for row in rows(section, self.protocol)],
            "skipped": self.skipped,
            "failures": self.failures,
        }

    def save(self, path: Path | None) -> None:
        if path is not None and any(variant.seconds for section in self.sections for variant in section.variants):
            content = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
            replace_whole(path, lambda part: part.write_text(content))

    def show(self, console: Console) -> None:
        for section in self.sections:
            if found := rows(section, self.protocol):
                console.print(_table(section, found, self.protocol))
        for one in self.skipped:
            console.print(escape(f"{one['workload']}: {one['peer']} is left out: {one['reason']}"), highlight=False)
        for failure in self.failures:
            console.print(f"[red]{escape(failure)}[/red]", highlight=False)
        if self.partial:
            console.print("[yellow]partial: not everything asked for was measured[/yellow]")


def rows(section: Section, protocol: Protocol) -> list[dict]:
    """Of the variants that were timed, peers after ours of their law."""
    mine = [variant for variant in section.variants if variant.ours is None]
    variants = [each for ours in mine for each in section.variants if each is ours or each.ours is ours]
    return [_row(section, variant, protocol) for variant in variants if variant.seconds]


def _row(section: Section, variant: Variant, protocol: Protocol) -> dict:
    size, runs, ours = section.size, section.seconds(variant), variant.ours
    p20, p80 = middle(runs)
    ratio = None
    if ours is not None and ours.seconds and variant.law_passed and ours.law_passed:
        ratio = protocol.ratio(section.seconds(ours), runs)
    num_tokens = size.batch * size.length
    return {
        "workload": section.workload,
        "peer": variant.name,
        "role": "ours" if ours is None else "peer",
        "device": section.device,
        "dtype": section.dtype,
        "batch": size.batch,
        "length": size.length,
        "num_steps": size.num_steps,
        "reveal": variant.reveal,
        "seconds": {
            "mean": statistics.mean(runs),
            "std": statistics.pstdev(runs),
            "median": statistics.median(runs),
            "p20": p20,
            "p80": p80,
            "runs": runs,
        },
        "tokens_per_second": num_tokens / protocol.center(runs),
        "tokens_per_second_std": statistics.pstdev(num_tokens / seconds for seconds in runs),
        "ratio": ratio and ratio.value,
        "ratio_low": ratio and ratio.low,
        "ratio_high": ratio and ratio.high,
        "nfe": variant.nfe,
        "logits_bytes": variant.logits_bytes,
        "law": variant.law,
        "law_passed": variant.law_passed,
        "note": _extrapolated(size, variant),
    }


def _extrapolated(size: Size, variant: Variant) -> str | None:
    """What of the workload was run, if not all of it."""
    parts = [f"{variant.sequences} of {size.batch} sequences"] if variant.sequences < size.batch else []
    parts += [f"{variant.reveals} of {size.length} reveals"] if variant.reveals < size.length else []
    return f"extrapolated from {' and '.join(parts)}" if parts else None


def _table(section: Section, found: list[dict], protocol: Protocol) -> Table:
    batch, length, num_steps, _ = section.size
    title = f"{section.workload}: {batch} × {length} tokens, {num_steps} steps, {section.device} {section.dtype}"
    table = Table(title=f"{title}, {protocol.name}", title_justify="left", title_style="bold", caption_justify="left")
    table.add_column("sampler", no_wrap=True)
    for name in ("s", "p20–p80", "tokens/s", "±", "× ours", protocol.bounds, "NFE", "logits MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("law and notes", overflow="fold", min_width=40)
    for row in found:
        if row["role"] == "ours":
            table.add_section()
        table.add_row(*_cells(row, protocol), style="dim" if row["role"] == "peer" else None)
    table.caption = "× ours: a peer's time over that of ours above it, which has its law; none where a law check failed"
    return table


def _cells(row: dict, protocol: Protocol) -> list[str]:
    seconds = row["seconds"]
    return [
        row["peer"],
        _number(protocol.center(seconds["runs"])),
        f"{_number(seconds['p20'])}–{_number(seconds['p80'])}",
        _number(row["tokens_per_second"]),
        _number(row["tokens_per_second_std"]),
        "" if row["ratio"] is None else _number(row["ratio"]),
        "" if row["ratio_low"] is None else f"{_number(row['ratio_low'])}–{_number(row['ratio_high'])}",
        _number(row["nfe"]),
        _number(row["logits_bytes"] / 1e6),
        "; ".join(filter(None, (row["law"], row["note"]))),
    ]


def _number(value: float) -> str:
    """Three digits or more, and no exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
