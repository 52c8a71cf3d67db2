"""The table of an evaluation."""

from rich.table import Table

from unmask.study.bootstrap import Interval
from unmask.study.evaluate import Evaluation

TITLES = {
    "entropy": "entropy (nats/token)",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "repetition_4": "repetition-4",
    "nll": "scorer's nats/token",
    "perplexity": "perplexity",
}


def quality_table(found: Evaluation) -> Table:
    """A column for each schedule, after the one of real text; below, differences from the first schedule and prices."""
    table = Table(
        title=f"{found.num_samples} texts of {found.length} tokens, {found.reveal}; 95 % intervals",
        caption=found.scorer and f"Perplexities are by {found.scorer}, and compare with each other only.",
        header_style="bold",
        box=None,
    )
    table.add_column("")
    for label in [*(["real text"] if found.heldout else []), *found.rows]:
        table.add_column(label, justify="right")
    qualities = [*([found.heldout] if found.heldout else []), *(row.quality for row in found.rows.values())]
    for name, title in TITLES.items():
        if name in qualities[0].measures:
            table.add_row(title, *(_cell(name, quality.measures[name]) for quality in qualities))
    blank = [""] * (found.heldout is not None)
    _add_differences(table, found, blank)
    rows = list(found.rows.values())
    table.add_row("")
    table.add_row("FLOPs saved", *blank, *(f"{row.saved.with_head:.1%}" for row in rows))
    table.add_row("… without the head", *blank, *(f"{row.saved.without_head:.1%}" for row in rows))
    table.add_row("seconds", *blank, *(f"{row.seconds:.1f}" for row in rows))
    return table


def _add_differences(table: Table, found: Evaluation, blank: list[str]) -> None:
    first, *others = found.rows.values()
    if not others:
        return
    table.add_row("")
    for name in ("entropy", "perplexity"):
        if name in first.quality.measures:
            cells = (_cell(name, row.difference.measures[name]) for row in others)
            table.add_row(f"{name} − first", *blank, "", *cells)
    if first.quality.num_scored is not None:
        ratios = (_skewed(row.difference.perplexity_ratio, ".3f") for row in others)
        table.add_row("perplexity / first", *blank, "", *ratios)


def _cell(name: str, interval: Interval) -> str:
    return _skewed(interval, ".1f") if name == "perplexity" else str(interval)


def _skewed(interval: Interval, digits: str) -> str:
    """Both ends of an interval, for what is not spread evenly about its value."""
    value, low, high = (format(number, digits) for number in interval)
    return f"{value} [{low}, {high}]"
