"""Plots of studies, by matplotlib (`pip install 'unmask[study]'`)."""

from itertools import cycle
from pathlib import Path

from unmask.study.importance import Importance

FORMATS = ("png", "svg")
COLOURS = ("#1b3a6b", "#c8553d", "#588157", "#7b4f9d", "#b98a2f")  # told apart in grey and by colour-blind eyes


def check_installed() -> None:
    """Raise ValueError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'unmask[study]'") from error


def plot_importance(found: Importance, stem: Path) -> list[Path]:
    """Losses on the left; gaps and divergences on the right. Writes `stem` with each of FORMATS."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.9 + 0.2 * len(found.models)), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    rates = [(one.low + one.high) / 2 for one in found.bins]
    for name, colour in zip(found.models, cycle(COLOURS), strict=False):
        _band(left, rates, [one.loss[name] for one in found.bins], colour, name)
    first = found.models[0]
    for name, colour in list(zip(found.models, cycle(COLOURS), strict=False))[1:]:
        _band(right, rates, [one.gap[name] for one in found.bins], colour, f"loss of {name} − loss of {first}")
        _band(right, rates, [one.kl[name] for one in found.bins], colour, f"KL({first} ‖ {name})", dashed=True)
    left.set(ylabel="loss, nats per masked token", title="how well each model fills in")
    right.set(ylabel="nats per masked token", title="what the lighter model loses")
    right.axhline(0, color="#999999", linewidth=0.8)
    for axes in (left, right):
        axes.set(xlabel="share of positions still masked: 1 is the start of a text", xlim=(1, 0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        # Below, as the curves of many models leave no corner free.
        axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    paths = [stem.with_suffix(f".{kind}") for kind in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths


def _band(axes, rates, intervals, colour, label, dashed=False) -> None:
    axes.plot(rates, [one.value for one in intervals], "--" if dashed else "-", color=colour, label=label)
    axes.fill_between(
        rates, [one.low for one in intervals], [one.high for one in intervals], color=colour, alpha=0.18, linewidth=0
    )
