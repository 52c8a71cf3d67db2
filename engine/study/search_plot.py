"""The plot of a search: what each placement costs in quality, and the frontier of quality and FLOPs."""

from collections import defaultdict
from itertools import cycle
from pathlib import Path

import numpy as np

from unmask.study.placements import SHAPES
from unmask.study.plots import COLOURS, FORMATS
from unmask.study.ranking import EXACT, Row, Search

MARKERS = dict(zip(SHAPES, ("o", "^", "v", "s", "D", "X"), strict=True))
LABELS = {EXACT: "nats per token more than {} alone", "perplexity_ratio": "perplexity / that of {} alone"}
SHAPE_COLOURS = (*COLOURS[1:], COLOURS[0], "#3a8f9e")
MOST_STRIPS = 48
# A legend under the label of the horizontal axis, however tall the figure is.
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5.5, "frameon": False, "fontsize": "small"}
GREY = "#9a9a9a"


def plot_search(found: Search, stem: Path) -> list[Path]:
    """Placements by rank on the left, each as a strip of its segments; the frontier on the right. Writes `stem` with
    each of the formats of `unmask.study.plots`."""
    from matplotlib.figure import Figure

    rows = _strips_shown(found)
    figure = Figure(figsize=(13, max(4.8, 1.9 + 0.23 * len(rows))), layout="constrained")
    strips, points, frontier = figure.subplots(1, 3, width_ratios=(1.1, 2, 3.2))
    _draw_strips(strips, found, rows)
    _draw_points(points, found, rows)
    _draw_frontier(frontier, found)
    for axes in (points, frontier):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    paths = [stem.with_suffix(f".{kind}") for kind in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths


def _strips_shown(found: Search) -> list[Row]:
    """All rows, or where there are many those with a published shape and the best of the others."""
    _, *others = found.rows
    plain = [row.rank for row in others if not row.shapes]
    shown = set(plain[: max(0, MOST_STRIPS - len(others) + len(plain))])
    return [row for row in others if row.shapes or row.rank in shown]


def _draw_strips(axes, found: Search, rows: list[Row]) -> None:
    from matplotlib.patches import Patch

    fills = {name: {"color": colour} for name, colour in zip(found.models, cycle(COLOURS), strict=False)}
    fills[found.models[0]]["alpha"] = 0.25
    for y, row in enumerate(rows):
        for i, name in enumerate(row.models):
            axes.barh(y, 0.92, left=i + 0.04, height=0.78, **fills[name])
    axes.set_yticks(range(len(rows)), [f"{', '.join(row.shapes)}  {row.rank}" for row in rows], fontsize="small")
    axes.set(xlim=(0, found.num_segments), ylim=(len(rows) - 0.4, -0.6), xticks=())
    cut = len(rows) < len(found.rows) - 1
    axes.set(xlabel="start of a text → its end", title="best and published" if cut else "placement")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    patches = [Patch(label=name, **fill) for name, fill in fills.items()]
    axes.legend(handles=patches, ncols=2, **BELOW)


def _draw_points(axes, found: Search, rows: list[Row]) -> None:
    for y, row in enumerate(rows):
        colour = COLOURS[1] if row.shapes else COLOURS[0]
        axes.errorbar(row.measure.value, y, xerr=_error(row), fmt="o", ms=4, lw=1.2, color=colour)
    axes.axvline(_neutral(found), color="#999999", linewidth=0.8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=LABELS[found.measure].format(found.models[0]))
    axes.set_yticks(range(len(rows)), [])
    axes.tick_params(axis="y", length=0)
    axes.set_title("cost in quality, 95 % intervals")


def _draw_frontier(axes, found: Search) -> None:
    front = sorted((row for row in found.rows if row.on_front), key=lambda row: row.saved.without_head)
    ring = {"mfc": "none", "ms": 11, "color": COLOURS[0], "lw": 1.2, "zorder": 1}
    axes.plot(*zip(*map(_point, front), strict=True), "o-", label="best at its saving", **ring)
    plain = [row for row in found.rows if row.rank and not row.shapes]
    if plain:
        axes.plot(*zip(*map(_point, plain), strict=True), "o", ms=3, color=GREY, zorder=2, label="other placements")
    axes.plot(0, _neutral(found), "*", ms=12, color=COLOURS[0], zorder=4, label=f"{found.models[0]} alone")
    for row, name, offset in _set_apart(found):
        x, y = _point(row)
        at = SHAPES.index(name)
        look = {"fmt": MARKERS[name], "color": SHAPE_COLOURS[at], "ms": 7, "lw": 1.1, "mec": "white"}
        axes.errorbar(x + offset, y, yerr=_error(row), zorder=3, label=name, **look)
    by_label = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = sorted(by_label, key=lambda text: SHAPES.index(text) if text in SHAPES else -1)
    axes.legend([by_label[text] for text in order], order, ncols=3, **BELOW)
    axes.axhline(_neutral(found), color="#999999", linewidth=0.8)
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.set(xlabel="FLOPs saved, without the head (shapes stand to the right of their saving)")
    axes.set(ylabel=LABELS[found.measure].format(found.models[0]), title="quality and cost")


def _set_apart(found: Search) -> list[tuple[Row, str, float]]:
    """The rows with published shapes, once for each, and how far to the right of the others of one saving to put it."""
    groups, savings = defaultdict(list), {}
    for row in found.rows:
        mix = tuple(row.models.count(name) for name in found.models)
        groups[mix] += [(row, name) for name in row.shapes]
        savings.setdefault(mix, 100 * row.saved.without_head)
    apart = np.diff(sorted(savings.values()))
    step = min(max(savings.values()) / 50, apart.min(initial=100) / (len(SHAPES) + 2))
    ordered = (sorted(group, key=lambda pair: SHAPES.index(pair[1])) for group in groups.values())
    return [(row, name, (i + 1) * step) for group in ordered for i, (row, name) in enumerate(group)]


def _point(row: Row) -> tuple[float, float]:
    return 100 * row.saved.without_head, row.measure.value


def _error(row: Row) -> list[list[float]]:
    """A percentile interval need not hold the estimate itself."""
    value, low, high = row.measure
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _neutral(found: Search) -> float:
    return 0.0 if found.measure == EXACT else 1.0
