"""The operators' rows on a terminal: a table for each operator, part, shape and dtype, as wide as there is room."""

from itertools import groupby

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import family
from benchmarks.ceilings import Ceilings
from benchmarks.peers import HEAD_PEERS
from benchmarks.report import Report
from benchmarks.rows import KIND, REFERENCE, Row

PUBLISHED = HEAD_PEERS[0].name
# What a narrow table does without, the first of them first.
_DISPENSABLE = ("floor µs", "× graph", "× warm", "× cold", "GFLOP/s", "GB/s", "MB", "p20–p80", "of rate", "of GB/s")
_LETTERS = {  # of the sizes that all rows of a table share
    "hidden_size": "D",
    "vocab_size": "V",
    "embedding_size": "E",
    "length": "L",
    "num_queries": "queries",
    "num_heads": "H",
    "num_kv_heads": "G",
    "head_dim": "D / H",
}
_CHECKED = "law and notes"
_LEAST_CHECKED, _MOST_CHECKED = 22, 44
_NOTES = (
    "",
    "p20–p80, rates and shares are of the graph's replay where there is one, else of the cold run",
    "of GB/s, of rate: shares of this machine's measured ceilings; of floor: of the time that these predict",
    f"× published: the time of {PUBLISHED} over this one's; × cold, warm, graph: that of the fastest peer",
)

Pair = tuple[Row, Ceilings]


class OperatorReport(Report):
    """`base`: the commit of the rows whose side is "base"."""

    kind = KIND
    base: str | None = None

    def as_dict(self) -> dict:
        return super().as_dict() | {"base": self.base}

    def tables(self, width: int) -> list[Table]:
        ours = [pair for pair in self.rows if pair[0].side == "this"]
        found = [_table(list(group), width) for _, group in groupby(ours, lambda pair: _title(pair[0]))]
        if found:
            found[-1].caption = "\n".join(filter(None, [found[-1].caption, *_NOTES]))
        return found


def _title(row: Row) -> str:
    what = family(row.operator).parts[row.part]
    sizes = ", ".join(f"{_LETTERS[name]} = {size:,}" for name, size in row.shape.items() if name in _LETTERS)
    return f"{row.operator}: {what}; {row.model} ({sizes}), {row.device} {row.dtype}"


def _table(pairs: list[Pair], width: int) -> Table:
    seen = {row.implementation for row, _ in pairs if row.timing or row.law}
    absent = {row.implementation: row.note for row, _ in pairs if row.implementation not in seen}
    shown = [pair for pair in pairs if pair[0].implementation in seen]
    cells = [_cells(*pair) for pair in shown]
    names = _fitting([name for name in (cells[0] if cells else {}) if any(one[name] for one in cells)], cells, width)
    table = Table(title=_title(pairs[0][0]), title_justify="left", title_style="bold")
    for name in names:
        left = name in ("variant", _CHECKED)
        folded = {"overflow": "fold", "max_width": _MOST_CHECKED} if name == _CHECKED else {"no_wrap": True}
        table.add_column(name, justify="left" if left else "right", **folded)
    for _, group in groupby(zip(shown, cells, strict=True), lambda each: each[0][0].count):
        for (row, _), one in group:
            table.add_row(*(one[name] for name in names), style=None if row.role == "implementation" else "dim")
        table.add_section()
    table.caption = "\n".join(escape(f"not timed: {name} ({note})") for name, note in absent.items())
    table.caption_justify = "left"
    return table


def _fitting(names: list[str], cells: list[dict[str, str]], width: int) -> list[str]:
    """The columns that there is room for; three characters lie between two of them."""

    def room(name: str) -> int:
        needed = max(cell_len(text) for text in (name, *(one[name] for one in cells)))
        return 3 + (min(needed, _LEAST_CHECKED) if name == _CHECKED else needed)

    for name in _DISPENSABLE:
        if 1 + sum(map(room, names)) <= width:
            break
        names = [each for each in names if each != name]
    return names


def _cells(row: Row, ceilings: Ceilings) -> dict[str, str]:
    against, ours, timing = row.against(ceilings), row.role == "implementation", row.timing
    ratios = row.ratios.get(row.way, {})
    peers = {way: [ratio for name, ratio in each.items() if name != REFERENCE] for way, each in row.ratios.items()}
    return {
        row.unit: f"{row.count:,}",
        "variant": row.implementation,
        **{f"{way} µs": micro(each and each.median) for way, each in row.timings.items()},
        "p20–p80": f"{micro(timing.p20)}–{micro(timing.p80)}" if timing else "",
        "floor µs": micro(against["floor"]) if ours else "",
        "of floor": percent(against["floor_share"]) if ours else "",
        "GB/s": _giga(against["bandwidth"], 1),
        "of GB/s": percent(against["bandwidth_share"]),
        "GFLOP/s": _giga(against["rate"], 0) if row.flops else "",
        "of rate": percent(against["rate_share"]) if row.flops else "",
        "× reference": "" if PUBLISHED in ratios else times(ratios.get(REFERENCE)),
        "× published": times(ratios.get(PUBLISHED)),
        **{f"× {way}": times(min(peers.get(way) or [None])) for way in row.timings},
        "MB": "" if row.memory is None else f"{row.memory / 1e6:,.1f}",
        _CHECKED: escape("; ".join(filter(None, (_law(row), row.note)))),
    }


def _law(row: Row) -> str | None:
    if row.law_passed is not False:
        return row.law
    return f"{'FAILS' if row.role == 'implementation' else 'fails'}: {row.law}"


def micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.1f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _giga(rate: float | None, digits: int) -> str:
    return "" if rate is None else f"{rate / 1e9:,.{digits}f}"
