"""Which cases a command is about: its options, and the points that they leave."""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.arguments import count, counts, names
from benchmarks.cases import Point, operators, points
from benchmarks.models import SHAPES
from benchmarks.results import must_be_folder
from benchmarks.shapes import Shape
from benchmarks.variants import implementations

DTYPES = "float32", "bfloat16", "float16"
DEFAULTS = {
    "cpu": {"dtype": ["float32", "bfloat16"], "shape": ["mdlm-small", "bundled"]},
    "cuda": {"dtype": ["bfloat16"], "shape": list(SHAPES)},
}


def parse(arguments: list[str], description: str) -> argparse.Namespace:
    options = _parser(description).parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    if options.out is not None:
        try:
            must_be_folder(options.out)
        except ValueError as error:
            sys.exit(str(error))
    defaults = DEFAULTS[options.device]
    options.operator = options.operator or list(operators())
    options.dtype = options.dtype or defaults["dtype"]
    options.shape = dict(options.shape or [(name, SHAPES[name]) for name in defaults["shape"]])
    options.impl = options.impl and frozenset(options.impl)
    options.memory = options.device == "cuda" if options.memory is None else options.memory
    options.deadline = time.monotonic() + options.budget
    return options


def chosen_points(options: argparse.Namespace) -> list[Point]:
    """At least one; a sentence and the end of the program where nothing is left."""
    with_impl = operators_with(options.operator, options.impl)
    sizes = {"rows": options.rows, "sequences": options.sequences}
    every = points(with_impl, options.shape, options.device, sizes)
    asked = options.case or [""]
    for words in asked:
        if not any(has(point, words) for point in every):
            known = dict.fromkeys(word for point in every for word in (point.operator, *point.name.split()))
            sys.exit(f"--case: no case has all the words {words!r}; they have: {', '.join(known)}")
    return [point for point in every if any(has(point, words) for words in asked)]


def has(point: Point, words: str) -> bool:
    return set(words.split()) <= {point.operator, *point.name.split()}


def operators_with(asked: list[str], impl: frozenset[str] | None) -> list[str]:
    """Those of the operators that have an implementation of these, of which one must serve here."""
    if impl is None:
        return asked
    known = operators()
    found = [name for name in asked if impl & set(known[name])]
    if not found:
        have = "; ".join(f"{name} has {', '.join(known[name])}" for name in asked)
        sys.exit(f"--impl {','.join(sorted(impl))}: there is nothing to time: {have}")
    able = [one for name in found for one in implementations(name, impl)]
    if all(one.lacks for one in able):
        reasons = "; ".join(dict.fromkeys(f"{one.name}: {one.lacks}" for one in able))
        sys.exit(f"--impl {','.join(sorted(impl))}: none can run here: {reasons}")
    return found


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks run",
        usage="python -m benchmarks run [options], see --help",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = operators()
    every = list(dict.fromkeys(name for each in known.values() for name in each))
    add = parser.add_argument
    add("--operator", type=names(known), metavar="NAMES", help=f"some of {','.join(known)}; default: all")
    add("--case", action="append", metavar="WORDS", help="cases with all these words; may be repeated; see --list")
    add("--impl", type=names(every), metavar="NAMES", help=f"some of {','.join(every)}; default: all that serve")
    add("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", type=names(DTYPES), help=f"some of {','.join(DTYPES)}; default: what the device is for")
    add("--rows", type=counts, help="numbers of rows, as in 1,8,32")
    add("--sequences", type=counts, help="numbers of sequences of attention, as in 1,8")
    shape_help = f"{', '.join(SHAPES)}, or hidden size, ids, heads and tokens; may be repeated"
    add("--shape", type=_shape, action="append", metavar="NAME|D,V,H,L", help=shape_help)
    add("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (default: torch's choice)")
    add("--out", type=Path, metavar="DIR", help="folder of the results, written also while they grow")
    add("--base", metavar="REV", help="hold this checkout's kernels against those of another commit")
    add("--draws", type=count, default=50_000, help="draws of the law check (default: 50000)")
    add("--seconds", type=float, default=0.5, help="time given to a variant, each way, at each size (default: 0.5)")
    add("--limit", type=float, default=1.0, help="leave a variant out where one run would take longer (default: 1 s)")
    add("--budget", type=float, default=float("inf"), help="seconds after which no new case is begun")
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="time peers beside sample_head")
    memory = "measure the memory of the largest size (default: on a GPU, where it takes no process for each variant)"
    add("--memory", action=argparse.BooleanOptionalAction, help=memory)
    add("--list", action="store_true", help="print the names of the cases and end")
    return parser


def _shape(text: str) -> tuple[str, Shape]:
    if text in SHAPES:
        return text, SHAPES[text]
    sizes = text.split(",")
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(SHAPES)}, or D,V,H,L, got {text!r}")
    hidden_size, vocab_size, num_heads, length = map(count, sizes)
    if hidden_size % (2 * num_heads):
        raise argparse.ArgumentTypeError(f"must have an even number of columns for each of {num_heads} heads: {text!r}")
    return text, Shape(hidden_size, vocab_size, num_heads, num_heads, length)
