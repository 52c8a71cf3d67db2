"""The table of a search."""

from string import ascii_uppercase, digits

from rich.table import Table

from unmask.study.bootstrap import Interval
from unmask.study.ranking import EXACT, Row, Search

TITLES = {"perplexity_ratio": "perplexity\n/ first", EXACT: "nats/token\n− first"}


def search_table(found: Search) -> Table:
    """A row for each schedule, best first, the first model alone on top."""
    letters = letters_of(found.models)
    keys = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    table = Table(
        title=f"{len(found.rows)} schedules, each {found.num_samples} texts of {found.length} tokens, {found.reveal}",
        caption=f"{found.num_segments} segments from the start of a text: {keys}. * no other saves more and is better. "
        f"95 % intervals, text by text against {found.models[0]} alone.{_told_apart(found)}{_scorer(found)}",
        header_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
    )
    predicted = any(row.predicted is not None for row in found.rows)
    table.add_column("", justify="right")
    table.add_column("segments", no_wrap=True)
    table.add_column("shape", min_width=11, max_width=14)
    table.add_column(TITLES[found.measure], justify="right", no_wrap=True)
    if predicted:
        table.add_column("predicted\nnats/token", justify="right", no_wrap=True)
    for title in ("entropy\n", "dis-\ntinct-2", "FLOPs\nsaved", "without\nhead"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.rows:
        first = row.rank is None
        place = ("–" if first else str(row.rank)) + ("*" if row.on_front else " ")
        cells = [place, "".join(letters[name] for name in row.models), ", ".join(row.shapes)]
        cells.append("" if first else _skewed(row.measure))
        cells += [_signed(row.predicted)] if predicted else []
        cells += [_value(row, "entropy", ".3f"), _value(row, "distinct_2", ".3f")]
        table.add_row(*cells, f"{row.saved.with_head:.1%}", f"{row.saved.without_head:.1%}")
    return table


def letters_of(models: tuple[str, ...]) -> dict[str, str]:
    """A sign for each model: a dot for the first, for others their first letter that is still free."""
    found = {models[0]: "·"}
    for name in models[1:]:
        wanted = [*name.upper(), *ascii_uppercase, *digits]
        found[name] = next(sign for sign in wanted if sign.isalnum() and sign not in found.values())
    return found


def _told_apart(found: Search) -> str:
    """Which published shapes of one saving differ, in pairs of texts."""
    names = {row.schedule: row.shapes[0] for row in found.rows if row.shapes}
    neutral = 0.0 if found.measure == EXACT else 1.0
    apart = []
    for pair in found.pairs:
        if not pair.measure.low <= neutral <= pair.measure.high:
            better, worse = (pair.one, pair.other)[:: 1 if pair.measure.value > neutral else -1]
            apart.append(f"{names[better]} before {names[worse]}")
    if not found.pairs:
        return ""
    return f" Told apart of {len(found.pairs)} pairs of published shapes: {', '.join(apart) or 'none'}."


def _scorer(found: Search) -> str:
    return "" if found.measure == EXACT else f" Perplexities are by {found.scorer}, and compare with each other only."


def _skewed(interval: Interval) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.4f} ±{(interval.high - interval.low) / 2:.4f}"


def _value(row: Row, name: str, digits: str) -> str:
    found = row.quality.measures.get(name)
    return "" if found is None else format(found.value, digits)
