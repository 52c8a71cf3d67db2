"""A profile on a terminal."""

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from unmask.profile.result import Profile
from unmask.progress import COLOURS

WIDTH = 100  # where there is no terminal
BAR, LINE = 20, 76  # characters of the longest bar, and of the line of ticks
LEVELS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉"
PHASES = {
    "plan": "reveal times and ticks",
    "transfer": "tokens into and out of slots",
    "body": "hidden rows, attention apart",
    "attention": "",
    "head": "logits and draw in one",
    "decode": "token ids to text",
    "idle": "the loop itself, or waiting",
}


def show(found: Profile, console: Console) -> None:
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    for part in (_title(found), _phases(found), _models(found), _line_of_ticks(found), _totals(found)):
        console.print(part)
        console.print()
    for note in found.notes:
        console.print(f"Note: {note}.", style="yellow", highlight=False)


def _title(found: Profile) -> Text:
    stats, request = found.stats, found.settings
    first = (
        f"{request['num_samples']} texts of {request['length']} tokens, {request['reveal']}, {request['schedule']}, "
        f"{request['dtype']} on {request['device']}, threads: {request['threads']}"
    )
    calls = "" if found.partial else f"{sum(stats.nfe.values()):.1f} network calls per text, "
    second = (
        f"{_seconds(found.total)}, {found.tokens_per_second:,.0f} tokens/s, {calls}"
        f"{stats.num_ticks:,} ticks, {stats.occupancy:.0%} full"
    )
    return Text.assemble((first, "dim"), "\n", (second, "bold"))


def _phases(found: Profile) -> Table:
    table = _table("phase", ">seconds", ">share", "", "")
    longest = max(seconds for name, seconds in found.phases.items() if name != "total")
    for name, seconds in found.phases.items():
        if name != "total":
            bar, meaning = Text(_bar(seconds / longest), "cyan"), Text(PHASES[name], "dim")
            table.add_row(name, _seconds(seconds), f"{seconds / found.total:.1%}", bar, meaning)
    return table


def _models(found: Profile) -> Table:
    table = _table("model", ">share", ">NFE", ">ticks", ">full", ">median", ">p20–p80", ">GFLOP/s", "blocks")
    model, num_sequences = (np.array(found.columns[key]) for key in ("model", "num_sequences"))
    for index, (name, sums) in enumerate(found.model_seconds.items()):
        chosen = model == index
        if not chosen.any():
            table.add_row(Text(name, _colour(index)), "0%")
            continue
        low, middle, high = np.quantile(found.ticks["total"][chosen], (0.2, 0.5, 0.8))
        table.add_row(
            Text(name, _colour(index)),
            f"{sums['total'] / found.total:.1%}",
            "" if found.partial else f"{found.stats.nfe[name]:.1f}",
            f"{chosen.sum():,}",
            f"{num_sequences[chosen].mean() / found.sampler.max_batch:.0%}",
            _seconds(middle),
            _between(low, high),
            f"{found.stats.cost.flops[name].total / sums['total'] / 1e9:,.0f}",
            Text(_levels(sums["blocks"], max(sums["blocks"], default=1)), _colour(index)),
        )
    return table


def _line_of_ticks(found: Profile) -> Text:
    """The run from left to right: who was at work at each moment, and with how full a tick."""
    starts, totals = found.ticks["start"], found.ticks["total"]
    line = Text()
    for moment in (np.arange(LINE) + 0.5) / LINE * found.total:
        tick = int(np.searchsorted(starts, moment, side="right")) - 1
        if tick < 0 or moment > starts[tick] + totals[tick]:
            line.append(" ")
        else:
            share = found.columns["num_sequences"][tick] / found.sampler.max_batch
            line.append(_level(share), _colour(found.columns["model"][tick]))
    names = Text(", ").join(Text(name, _colour(index)) for index, name in enumerate(found.models))
    legend = Text.assemble(("ticks", "bold"), f"  how full, █ is {found.sampler.max_batch} sequences; by ", names)
    return Text.assemble(legend, "\n", line, "\n", (f"0 s{_seconds(found.total):>{LINE - 3}}", "dim"))


def _totals(found: Profile) -> Table:
    stats, water = found.stats, found.high_water
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row(
        "rate",
        f"{_count(found.flops_per_second)}FLOP/s, {found.flops_per_second / found.ceiling:.0%} of the "
        f"{_count(found.ceiling)}FLOP/s that a large product reaches here",
    )
    memory = f"{decimal(stats.peak_bytes)} of planned buffers"
    if water.resident_peak is not None:
        memory += f"; {decimal(water.resident_peak)} resident at most, {decimal(water.resident_before)} before"
    if water.device_peak is not None:
        memory += f"; {decimal(water.device_peak)} allocated on the GPU at most, weights included"
    table.add_row("memory", memory)
    table.add_row(
        "logits",
        f"{decimal(found.logits_bytes_avoided)} never written: {found.num_spared_steps:,} steps × "
        f"{found.num_positions:,} positions × {found.vocab_size:,} ids × 4 bytes",
    )
    if found.host_seconds is not None:
        host = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in found.host_seconds.items())
        table.add_row("host", f"{host}, while the GPU works")
    return table


def _table(*titles: str) -> Table:
    """A plain table; titles that begin with ">" are over right-justified columns."""
    table = Table(box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    for title in titles:
        table.add_column(title.lstrip(">"), justify="right" if title.startswith(">") else "left", no_wrap=True)
    return table


def _bar(share: float) -> str:
    whole, rest = divmod(round(share * BAR * 8), 8)
    return "█" * whole + EIGHTHS[rest].strip()


def _levels(values: list[float], most: float) -> str:
    return "".join(_level(value / most) for value in values)


def _level(share: float) -> str:
    return LEVELS[max(0, min(len(LEVELS) - 1, round(share * len(LEVELS)) - 1))]


def _colour(model: int) -> str:
    return COLOURS[model % len(COLOURS)]


def _seconds(value: float) -> str:
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def _between(low: float, high: float) -> str:
    """Both in the unit of the higher."""
    number, unit = _seconds(high).split()
    scale = {"s": 1, "ms": 1e3, "µs": 1e6}[unit]
    return f"{low * scale:.3g}–{number} {unit}"


def _count(value: float) -> str:
    return f"{value / 1e12:,.1f} T" if value >= 1e12 else f"{value / 1e9:,.1f} G"
