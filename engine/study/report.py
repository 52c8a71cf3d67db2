"""The table of an evaluation."""

from rich.table import Table

from unmask.study.evaluate import Evaluation

MEASURES = {
    "entropy": "entropy, nats per token",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "repetition_4": "repetition-4",
    "nll": "scorer's nats per token",
    "perplexity": "generative perplexity",
}


def quality_table(found: Evaluation) -> Table:
    """A column for each schedule, after the one of real text."""
    table = Table(
        title=f"{found.num_samples} texts of {found.length} tokens, {found.reveal}; 95 % intervals",
        caption=found.scorer and f"Perplexities are by {found.scorer}, and compare with each other only.",
        header_style="bold",
    )
    table.add_column("")
    if found.heldout is not None:
        table.add_column("real text")
    for label in found.rows:
        table.add_column(label)
    qualities = [*([found.heldout] if found.heldout else []), *(row.quality for row in found.rows.values())]
    for name, title in MEASURES.items():
        if name in qualities[0].measures:
            table.add_row(title, *(str(quality.measures[name]) for quality in qualities))
    _add_differences(table, found)
    blank = [""] * (found.heldout is not None)
    rows = list(found.rows.values())
    table.add_section()
    table.add_row("FLOPs saved", *blank, *(f"{row.saved.with_head:.1%}" for row in rows))
    table.add_row("… without the head", *blank, *(f"{row.saved.without_head:.1%}" for row in rows))
    table.add_row("seconds of sampling", *blank, *(f"{row.seconds:.1f}" for row in rows))
    return table


def _add_differences(table: Table, found: Evaluation) -> None:
    first, *others = found.rows.values()
    if not others:
        return
    blank = [""] * (found.heldout is not None) + ["—"]
    table.add_section()
    for name, title in MEASURES.items():
        if name in first.quality.measures and name in ("entropy", "perplexity"):
            found_here = (str(row.difference.measures[name]) for row in others)
            table.add_row(f"{title.split(',')[0]} − first", *blank, *found_here)
    if first.quality.num_scored is not None:
        table.add_row("perplexity / first", *blank, *(str(row.difference.perplexity_ratio) for row in others))
