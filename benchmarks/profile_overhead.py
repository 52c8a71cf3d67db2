"""What do the spans of `unmask profile` cost where nobody listens to them?

    python -m benchmarks.profile_overhead --threads 1 --out results.json

The same texts are sampled in turn: with the spans cut out of the source (absent), as `unmask sample` runs (off), and
noting every span as `unmask profile` does (on). A round gives the extra time of off and on over absent, and the table
the median of these with its 20th and 80th percentile. On a machine with other work that is as wide as the rounds
differ, so the last column counts instead: the spans of a run times the seconds of one, alone in a loop, as a share of
the run. The table goes to standard error, the JSON to the file.
"""

import argparse
import ast
import inspect
import json
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

import unmask
from benchmarks.arguments import count
from benchmarks.machine import command, describe
from benchmarks.timing import host_clock
from unmask import graphs, run, sampler
from unmask.models import dit
from unmask.options import named_sources
from unmask.profile.recorder import Recorder
from unmask.request import SANDWICH
from unmask.spans import SILENT, Spans

_CALLS, _LOOPS = 10_000, 10
_CPU = torch.device("cpu")
VARIANTS = "absent", "off", "on"


class _WithoutSpans(ast.NodeTransformer):
    """Takes `self.spans(…)` and `self._spans(…)` out of every with statement."""

    def visit_With(self, node: ast.With) -> ast.With | list[ast.stmt]:
        self.generic_visit(node)
        node.items = [item for item in node.items if not _is_span(item.context_expr)]
        return node if node.items else node.body


@contextmanager
def absent() -> Iterator[None]:
    """Meanwhile samplers and transformers run code that has no spans."""
    bare = {module: _bare(module) for module in (run, graphs, dit)}
    bare[run].executors = bare[graphs].executors
    with ExitStack() as stack:
        stack.enter_context(patch.object(sampler, "Run", bare[run].Run))
        stack.enter_context(patch.object(dit, "_Call", bare[dit]._Call))
        yield


class Counting(Spans):
    def __init__(self) -> None:
        self.num_spans = 0

    def __call__(self, name: str, number: int = 0):
        self.num_spans += 1
        return super().__call__(name, number)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    models = unmask.load_all(named_sources(options.model), dtype=options.dtype)
    schedule = None if len(models) == 1 else options.schedule
    made = unmask.Sampler(models, schedule=schedule, reveal=unmask.Ancestral(options.steps))
    sample = partial(made.sample, options.num_samples, options.length)
    seconds, counting = _rounds(sample, options.rounds), Counting()
    sample(spans=counting)
    content = {
        "kind": "overhead",
        "schema": 1,
        "partial": False,
        "command": command("benchmarks.profile_overhead", arguments),
        **describe(_CPU),
        "seconds": seconds,
        "extra": {name: _extra(seconds, name) for name in VARIANTS[1:]},
        "num_spans": counting.num_spans,
        "span_seconds": {"off": _each(SILENT), "on": _each(Recorder(_CPU))},
    }
    console = Console(stderr=True)
    console.print(_table(content))
    if options.out is not None:
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _rounds(sample: Callable[..., object], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; the order is turned by one from round to round."""

    def once(variant: str) -> float:
        if variant == "absent":
            with absent():
                return host_clock(sample)
        return host_clock(partial(sample, spans=Recorder(_CPU)) if variant == "on" else sample)

    seconds = {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:
        once(variant)
    for turn in range(rounds):
        first = turn % len(VARIANTS)
        for variant in VARIANTS[first:] + VARIANTS[:first]:
            seconds[variant].append(once(variant))
    return seconds


def _extra(seconds: dict[str, list[float]], variant: str) -> dict[str, float]:
    """Of a variant's time over that without spans, as a share of it."""
    shares = [one / none - 1 for one, none in zip(seconds[variant], seconds["absent"], strict=True)]
    p20, _, _, p80 = statistics.quantiles(shares, n=5, method="inclusive")
    return {"median": statistics.median(shares), "p20": p20, "p80": p80}


def _each(spans: Spans) -> float:
    """Seconds of one span around nothing."""
    loops = timeit.repeat("with spans('attention'): pass", globals={"spans": spans}, number=_CALLS, repeat=_LOOPS)
    return min(loops) / _CALLS


def _table(content: dict) -> Table:
    table = Table(title=f"{content['num_spans']:,} spans in a run", header_style="bold", box=None)
    for column in ("spans", "seconds", "extra", "p20–p80", "one span", "counted"):
        table.add_column(column, justify="right")
    for variant, taken in content["seconds"].items():
        middle, cells = statistics.median(taken), ("", "", "", "")
        if variant in content["extra"]:
            extra, each = content["extra"][variant], content["span_seconds"][variant]
            spread = f"{extra['p20']:+.2%} to {extra['p80']:+.2%}"
            counted = each * content["num_spans"] / middle
            cells = f"{extra['median']:+.2%}", spread, f"{each * 1e9:,.0f} ns", f"{counted:.4%}"
        table.add_row(variant, f"{middle:.3f}", *cells)
    return table


@cache
def _bare(module: ModuleType) -> ModuleType:
    """A module made from another's source without its spans."""
    tree = ast.fix_missing_locations(_WithoutSpans().visit(ast.parse(inspect.getsource(module))))
    made = ModuleType(module.__name__)
    exec(compile(tree, module.__file__, "exec"), made.__dict__)
    return made


def _is_span(expression: ast.expr) -> bool:
    named = isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute)
    return named and expression.func.attr in ("spans", "_spans")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", action="append", metavar="NAME=SOURCE", help="a denoiser; default: the bundled pair")
    add("--schedule", default=SANDWICH, metavar="SEGMENTS", help="of several models")
    add("--num-samples", "-n", type=count, default=8, help="texts of a run (default: 8)")
    add("--length", type=count, default=256, help="tokens of a text (default: 256)")
    add("--steps", type=count, default=64, help="of ancestral sampling (default: 64)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--rounds", type=count, default=9, help="runs of each variant, at least 2 (default: 9)")
    add("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (default: torch's choice)")
    add("--out", type=Path, metavar="FILE.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for a spread, got {options.rounds}")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out must lie in a folder that exists, got {options.out}")
    return options


if __name__ == "__main__":
    sys.exit(main())
