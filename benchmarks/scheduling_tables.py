"""The tables of the page on model scheduling, from the results beside it."""

import json
import statistics
from functools import cache

from benchmarks.machine import ROOT
from benchmarks.markdown import markdown
from unmask import Ancestral, load
from unmask.study.placements import SHAPES, arrangements, shapes_of
from unmask.study.prediction import Losses, Prediction

FOLDER = ROOT / "benchmarks" / "results" / "scheduling"
LIGHT = {"light": "sotu-light", "scratch": "sotu-scratch", "exit": "sotu-exit"}
NUM_SEGMENTS, NUM_LIGHT, LENGTH, NUM_STEPS = 8, 2, 256, 256


def divergence_table() -> str:
    """Mean over mask rates of loss gap and KL, nats per token."""
    bins = _result("importance")["bins"]
    rows = []
    for name, source in LIGHT.items():
        gap, kl = (statistics.mean(one[kind][name]["value"] for one in bins) for kind in ("gap", "kl"))
        rows.append([f"`{source}`", f"{gap:.3f}", f"{kl:.3f}"])
    return markdown(["", "loss − that of `sotu-heavy`", "KL from `sotu-heavy`"], rows)


def bound_table() -> str:
    """What each published shape of two segments adds to the bound, and its rank among all placements."""

    def cells(name: str) -> dict[str, str]:
        found = {}
        for rank, (extra, placement) in enumerate(_predicted(name), 1):
            for shape in shapes_of(placement, "heavy"):
                found[shape] = f"{rank}: {extra.value:.4f} ± {(extra.high - extra.low) / 2:.4f}"
        return found

    columns = [cells(name) for name in LIGHT]
    order = sorted(SHAPES, key=lambda shape: float(columns[0][shape].split()[1]))
    return markdown(
        ["", *(f"`{source}`" for source in LIGHT.values())],
        [[shape, *(column[shape] for column in columns)] for shape in order],
    )


def _predicted(name: str) -> list[tuple]:
    """Extra nats per token of all placements of two segments, the least first."""
    models = {"heavy": load("sotu-heavy"), name: load(LIGHT[name])}
    prediction = Prediction(Losses.read(FOLDER / "importance.json", models, LENGTH), Ancestral(NUM_STEPS), LENGTH)
    found = [(prediction.interval(one.schedule), one) for one in arrangements("heavy", {name: NUM_LIGHT}, NUM_SEGMENTS)]
    return sorted(found, key=lambda pair: pair[0].value)


def placement_table() -> str:
    """The published shapes of two segments among all 28 placements, by two scorers."""
    scorers = ("search-light", "search-light-smollm2")
    rows = {name: {shape: row for row in _result(name)["rows"] for shape in row["shapes"]} for name in scorers}
    order = sorted(SHAPES, key=lambda shape: rows[scorers[0]][shape]["rank"])
    return markdown(
        ["", "trigram of the training text", "SmolLM2-135M"],
        [[shape, *(f"{rows[name][shape]['rank']}: {_interval(rows[name][shape])}" for name in scorers)]
         for shape in order],
    )  # fmt: skip


def frontier_table(name: str) -> str:
    """Perplexity of each published shape at every saving, over that of the heavy model alone."""
    rows = _result(f"frontier-{name}")["rows"][1:]
    by_light = {num: [row for row in rows if row["models"].count(name) == num] for num in range(1, 6)}
    savings = [statistics.mean(row["saved"]["without_head"] for row in found) for found in by_light.values()]

    def cell(shape: str, found: list[dict]) -> str:
        return next((_interval(row) for row in found if shape in row["shapes"]), "")

    return markdown(
        [f"`{LIGHT[name]}`", *(f"{saving:.0%} saved" for saving in savings)],
        [[shape, *(cell(shape, found) for found in by_light.values())] for shape in SHAPES],
    )


def time_table() -> str:
    """Seconds saved beside FLOPs saved, of `benchmarks.schedules`."""
    titles = {
        "heavy:75% light:25%": "light last",
        "light:12.5% heavy:75% light:12.5%": "sandwich",
        "light:25% heavy:50% light:25%": "light first and last quarters",
        "light": "light alone",
    }
    rows = []
    for row in _result(TIMES)["rows"]:
        if row["schedule"] in titles:
            low, _, _, high = statistics.quantiles(row["saved"], n=5, method="inclusive")
            middle = statistics.median(row["saved"])
            saved = f"{middle:.1%} ({100 * low:.1f}–{100 * high:.1f})"
            rows.append([titles[row["schedule"]], f"{row['saved_flops']:.1%}", saved, f"{row['realised']:.1%}"])
    return markdown(["", "FLOPs saved", "time saved (20th to 80th percentile)", "time / FLOPs"], rows)


def _interval(row: dict) -> str:
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["measure"])


@cache
def _result(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


TIMES = "time-cpu-2026-11-22"
TABLES = {
    "divergence": divergence_table,
    "bound": bound_table,
    "placements": placement_table,
    "frontier-light": lambda: frontier_table("light"),
    "frontier-scratch": lambda: frontier_table("scratch"),
    "frontier-exit": lambda: frontier_table("exit"),
    "time": time_table,
}
