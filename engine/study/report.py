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
    "mauve": "MAUVE",
    "exact_nll": "nats/token under the law",
}
SKEWED = {"perplexity": ".1f", "mauve": ".3f"}  # not spread evenly about their value: both ends, with these digits


def quality_table(found: Evaluation) -> Table:
    """A column for each schedule, after the one of real text; below, differences from the first schedule and prices."""
    table = Table(
        title=f"{found.num_samples} texts of {found.length} tokens, {found.reveal}; 95 % intervals",
        caption=_caption(found),
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
    _add_exact(table, found, blank)
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
    for name in ("entropy", "perplexity", "mauve", "exact_nll"):
        if name in first.quality.measures:
            cells = (_cell(name, row.difference.measures[name]) for row in others)
            table.add_row(f"{TITLES[name].split(' (')[0]} − first", *blank, "", *cells)
    if first.quality.num_scored is not None:
        ratios = (_skewed(row.difference.perplexity_ratio, ".3f") for row in others)
        table.add_row("perplexity / first", *blank, "", *ratios)


def _add_exact(table: Table, found: Evaluation, blank: list[str]) -> None:
    exact = [row.exact for row in found.rows.values()]
    if None in exact:
        return
    table.add_row("… exactly", *blank, *(f"{one.nll:.6f}" for one in exact))
    table.add_row("total variation, exactly", *blank, *(f"{one.total_variation:.6f}" for one in exact))


def _caption(found: Evaluation) -> str | None:
    """What the numbers must be read with."""
    lines = []
    if found.scorer:
        lines.append(f"Perplexities are by {found.scorer}, and compare with each other only.")
    if found.distance:
        far = found.distance
        lines.append(
            f"MAUVE is over {far.num_clusters} clusters of embeddings by {far.embedder}, against {far.num_reference} "
            f"other real texts. It is biased towards 0: compare it with real text's, and in runs of one size."
        )
        if far.share_cut:
            lines.append(f"{far.embedder} cuts texts at its context: {far.share_cut:.1%} of their tokens are not read.")
    if found.law_entropy is not None:
        lines.append(f"The law itself has {found.law_entropy:.6f} nats/token.")
    return "\n".join(lines) or None


def _cell(name: str, interval: Interval) -> str:
    return _skewed(interval, SKEWED[name]) if name in SKEWED else str(interval)


def _skewed(interval: Interval, digits: str) -> str:
    """Both ends of an interval, for what is not spread evenly about its value."""
    value, low, high = (format(number, digits) for number in interval)
    return f"{value} [{low}, {high}]"
