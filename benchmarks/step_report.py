"""Rows of the step benchmark, with the time that their bytes and FLOPs predict, and their tables."""

from dataclasses import dataclass, field, replace
from itertools import groupby

from rich.table import Table

from benchmarks.ceilings import Ceilings
from benchmarks.network import Pass, predicted
from benchmarks.report import Report
from benchmarks.timing import Timing

TITLES = {
    "step": "one step",
    "run": "whole run, extrapolated from a few of its steps",
    "memory": "memory beyond the weights",
    "growth": "whole runs against the number of steps",
}
_NOTE = "the published sampler in bfloat16: fp32 weights and autocast, as published for a GPU"


@dataclass(frozen=True)
class StepRow:
    """One side in one case.

    num_rows   positions that a tick reveals in all its sequences
    passes     of one step or tick, for the prediction
    timing     of one step or tick; for `growth`, of the whole run
    parts      seconds of one step by part
    calls      network calls of the whole run
    total      seconds of the whole run, extrapolated but for `growth`
    memory     peak bytes beyond the weights
    roofline   seconds on an H200 by hand
    check      what the comparison of the two networks found
    ratios     time, or memory, of the published variants over this one's; for `growth`, this one's over the runs with
               fewer steps
    """

    case: str
    variant: str
    kind: str
    device: str
    dtype: str
    batch: int
    length: int
    num_steps: int
    num_rows: int
    passes: list[Pass]
    timing: Timing | None = None
    parts: dict[str, float] = field(default_factory=dict)
    calls: float | None = None
    total: float | None = None
    memory: int | None = None
    predicted_memory: int | None = None
    roofline: float | None = None
    check: str | None = None
    note: str | None = None
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def compared(self) -> float | None:
        """What ratios are of."""
        if self.case == "memory":
            return self.memory
        return self.timing.median if self.case == "step" else self.total

    def against(self, ceilings: Ceilings) -> dict[str, float | None]:
        """Seconds that the ceilings predict, of a step or tick and of the run."""
        step = predicted(self.passes, ceilings)
        return {"predicted": step, "predicted_total": None if self.calls is None else step * self.calls}


def with_ratios(rows: list[StepRow]) -> list[StepRow]:
    """The rows of one case, `ratios` filled in for ours."""

    def ratios(row: StepRow) -> dict[str, float]:
        if row.kind == "peer" or not row.compared:
            return {}
        if row.case == "growth":
            shorter = [each for each in rows if each.num_steps < row.num_steps]
            return {f"N = {each.num_steps:,}": row.compared / each.compared for each in shorter}
        theirs = [each for each in rows if each.kind == "peer" and each.batch == row.batch and each.compared]
        return {f"{each.variant} {each.dtype}": each.compared / row.compared for each in theirs}

    return [replace(row, ratios=ratios(row)) for row in rows]


class StepReport(Report):
    kind = "step"

    def tables(self, width: int) -> list[Table]:
        return [_table(case, list(group)) for case, group in groupby(self.rows, lambda pair: pair[0].case)]


def _table(case: str, pairs: list[tuple[StepRow, Ceilings]]) -> Table:
    first = pairs[0][0]
    table = Table(title=f"{TITLES[case]}, {first.device}, L = {first.length:,}", title_style="bold")
    labels = list(dict.fromkeys(label for row, _ in pairs for label in row.ratios))
    cells = [_cells(row, row.against(ceilings), labels) for row, ceilings in pairs]
    names = [name for name in cells[0] if any(one[name] for one in cells)]
    for name in names:
        table.add_column(name, justify="left" if name in ("variant", "dtype", "notes") else "right", no_wrap=True)
    for (row, _), one in zip(pairs, cells, strict=True):
        table.add_row(*(one[name] for name in names), style="dim" if row.kind == "peer" else None)
    checks = [f"{row.dtype}: {row.check}" for row, _ in pairs if row.check]
    table.caption = "\n".join(
        [*dict.fromkeys(checks), *([_NOTE] if any(row.kind == "peer" for row, _ in pairs) else [])]
    )
    table.title_justify = table.caption_justify = "left"
    return table


def _cells(row: StepRow, against: dict[str, float | None], labels: list[str]) -> dict[str, str]:
    timing, stepwise = row.timing, row.case in ("step", "run")
    return {
        "N": f"{row.num_steps:,}",
        "B": f"{row.batch}",
        "rows": f"{row.num_rows}" if row.kind == "implementation" else "",
        "variant": row.variant,
        "dtype": row.dtype,
        "ms": _number(timing and timing.median * 1e3),
        "p20–p80": f"{_number(timing.p20 * 1e3)}–{_number(timing.p80 * 1e3)}" if timing else "",
        "predicted ms": _number(against["predicted"] * 1e3) if stepwise else "",
        "H200 ms": _number(row.roofline and row.roofline * 1e3),
        "calls": _number(row.calls),
        "run s": _number(row.total),
        "predicted s": _number(against["predicted_total"]),
        "MB": _number(row.memory and row.memory / 1e6),
        "predicted MB": _number(row.predicted_memory and row.predicted_memory / 1e6),
        **{f"× {label}": _number(row.ratios.get(label)) for label in labels},
        "parts, ms": ", ".join(f"{part} {_number(seconds * 1e3)}" for part, seconds in row.parts.items()),
        "notes": row.note or "",
    }


def _number(value: float | None) -> str:
    """Three digits or more, and no exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 100 else f"{value:.3g}"
