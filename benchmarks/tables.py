"""The tables of README.md and of the scheduling page, written from the committed results between their marks.

    python -m benchmarks.tables           writes what differs
    python -m benchmarks.tables --check   tells what differs, and writes nothing

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what stands there besides is replaced.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping

from safetensors import safe_open

from benchmarks.machine import ROOT
from benchmarks.markdown import markdown
from benchmarks.scheduling_tables import TABLES as SCHEDULING
from unmask.files import replace_whole

RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?<!-- end -->", re.DOTALL)
SIDES = ("unmask", "float32"), ("unmask", "bfloat16"), ("published", "float32"), ("published", "bfloat16")
BASELINE = "published float32"
PUBLISHED = "torch, published chain"
GREEDY = "greedy-cpu-2026-11-22.json"
BLOCKS = {"sotu-heavy": "12", "sotu-light": "4", "sotu-scratch": "4", "sotu-exit": "4, shared"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table differs")
    check = parser.parse_args(arguments).check
    stale = [page for page in PAGES if (text := page.read_text(encoding="utf-8")) != renewed(text, PAGES[page])]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'differs from the results' if check else 'written'}")
        if not check:
            text = renewed(page.read_text(encoding="utf-8"), PAGES[page])
            replace_whole(page, lambda file, text=text: file.write_text(text, encoding="utf-8"))
    return int(check and bool(stale))


def renewed(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with every table made anew. Raises ValueError for a mark of no table, or a table without a mark."""
    marks = [found[2] for found in MARKED.finditer(text)]
    if sorted(marks) != sorted(tables):
        raise ValueError(f"tables of the page must be {', '.join(sorted(tables))}, each once, got {', '.join(marks)}")
    return MARKED.sub(lambda found: f"{found[1]}\n{tables[found[2]]()}\n\n<!-- end -->", text)


def step_table() -> str:
    """A step, whole runs and memory beside the published sampler, of two files of `benchmarks.step`."""
    step, run = (_rows(f"{name}-cpu-2026-11-21.json") for name in ("step", "run"))

    def row(title: str, rows: list[dict], case: str, show: Callable[[dict], str], ratio: bool = True) -> list[str]:
        found = [next(one for one in rows if (one["case"], one["variant"], one["dtype"]) == (case, *s)) for s in SIDES]
        against = [one["ratios"].get(BASELINE) if ratio else None for one in found]
        return [title, *(show(one) + (f", **{x:.1f} ×**" if x else "") for one, x in zip(found, against, strict=True))]

    return markdown(
        ["", "unmask fp32", "unmask bf16", "published fp32", "published, bf16 autocast"],
        [
            row("one step, one sequence", step, "step", lambda one: f"{1e3 * one['timing']['median']:,.0f} ms"),
            row("8 sequences, 1000 steps, from 32 of each", run, "run", lambda one: f"{one['total']:,.0f} s"),
            row("memory beyond the weights, 8 sequences", step, "memory", lambda one: f"{one['memory'] / 1e6:,.0f} MB",
                ratio=False),
        ],
    )  # fmt: skip


def head_table() -> str:
    """How much faster the whole `sample_head` is than the published chain of operators, cold / warm."""
    rows = [one for one in _rows("sample_head-cpu-2026-11-21.json") if one["variant"] == "cpu" and one["ratios"]]
    sizes = sorted({one["num_rows"] for one in rows})

    def cell(part: str, dtype: str, size: int) -> str:
        one = next(one for one in rows if (one["part"], one["dtype"], one["num_rows"]) == (part, dtype, size))
        return " / ".join(f"{_two_digits(one['ratios'][way][PUBLISHED])}" for way in ("cold", "warm"))

    titles = {"whole": "head and draw", "sampling": "the draw alone, logits given"}
    return markdown(
        ["", *(f"{size} rows" if size > 1 else "1 row" for size in sizes)],
        [
            [f"{title}, {short}", *(cell(part, dtype, size) for size in sizes)]
            for part, title in titles.items()
            for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16"))
        ],
    )


def peers_table() -> str:
    """Whole runs beside other samplers, each after ours under the policy of its law."""
    rows = []
    for one in _rows("peers-cpu-2026-11-22.json"):
        seconds = one["seconds"]
        shown = f"{seconds['median']:,.1f} s ({seconds['p20']:,.1f}–{seconds['p80']:,.1f})"
        ratio = f"**{one['ratio']:.1f} ×** ({one['ratio_low']:.1f}–{one['ratio_high']:.1f})" if one["ratio"] else ""
        name = f"**{one['peer']}**" if one["role"] == "ours" else one["peer"]
        rows.append([name, one["reveal"], shown, f"{one['nfe']:.0f}", f"{one['logits_bytes'] / 1e6:,.1f} MB", ratio])
    return markdown(["", "law of", "seconds", "network calls a text", "logits stored", "time / ours"], rows)


def greedy_table() -> str:
    """LLaDA's `generate`, its drop-in, and caching: each dtype by itself."""
    rows = []
    for one in _rows(GREEDY):
        against = [f"**{ratio:.1f} ×**" if ratio else "" for ratio in (one["ratio"], one["ratio_own"])]
        seconds = f"{statistics.median(one['seconds']):,.1f} s"
        dtype = {"float32": "fp32", "bfloat16": "bf16"}[one["dtype"]]
        rows.append([f"{one['name']}, {dtype}", seconds, *against, f"{one['equal']:.1%}"])
    return markdown(["", "seconds", "LLaDA in fp32 / this", "LLaDA in this dtype / this", "its tokens"], rows)


def pair_table() -> str:
    """The bundled models, from their configs and what `unmask train` wrote beside them."""
    rows = []
    for name, blocks in BLOCKS.items():
        folder = ROOT / "engine" / "assets" / name
        with safe_open(folder / "model.safetensors", framework="np") as file:
            own = sum(math.prod(file.get_slice(tensor).get_shape()) for tensor in file.keys())  # noqa: SIM118
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        heldout = metrics["heldout"]
        bits = f"{heldout['bits_per_byte']:.3f} ± {heldout['standard_error_bits_per_byte']:.3f}"
        rows.append([f"`{name}`", blocks, f"{own / 1e6:.2f} M" + " of its own" * ("shared" in blocks), bits])
    for baseline, key in (("trigram (Kneser–Ney)", "trigram"), ("unigram", "unigram")):
        rows.append([f"{baseline}, same ids", "", "", f"{metrics[f'{key}_bits_per_byte']:.3f}"])
    return markdown(["", "blocks", "parameters", "held-out bound, bits per byte"], rows)


def _rows(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]


def _two_digits(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


PAGES = {
    ROOT / "README.md": {
        "greedy": greedy_table,
        "pair": pair_table,
        "peers": peers_table,
        "sample_head": head_table,
        "step": step_table,
    },
    RESULTS / "scheduling" / "README.md": SCHEDULING,
}

if __name__ == "__main__":
    sys.exit(main())
