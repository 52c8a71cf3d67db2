"""Times LLaDA's `generate` beside `unmask.dropin.llada.generate` on the same live module, greedy, in one run.

    python -m benchmarks greedy --threads 2 --llada PATH --out greedy.json

PATH is a checkout of github.com/ML-GSAI/LLaDA, whose code runs as it is. The module has the shape of SmolLM2-135M, a
head of its own, and random weights. Beside the ratios stands the share of tokens that are those of LLaDA's code in the
same dtype: all of them in fp32. Runs with kept keys and values are an approximation, and change some. Then the memory
that one step takes beyond the weights, of a thin module with LLaDA's vocabulary, in processes of their own.
"""

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.arguments import count
from benchmarks.machine import command, describe
from benchmarks.memory import in_a_process
from benchmarks.peers.checkout import importable, quiet
from benchmarks.peers.llada import CHECKOUT
from benchmarks.peers.plain_llama import PlainLlama
from benchmarks.protocol import Paired
from benchmarks.results import write
from benchmarks.timing import host_clock
from unmask import Blocks, Caching, Categorical, Confidence, Sampler
from unmask.dropin import llada
from unmask.live import wrap
from unmask.models.llama import Shape

KIND = "greedy"
SMOL = Shape(49_152, 576, 30, 1536, num_heads=9, num_kv_heads=3, head_dim=64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHES = {"prefix cache": Caching("prefix"), "dual cache": Caching("dual"), "dual cache, each 4": Caching("dual", 4)}
REQUEST = "batch", "prompt", "gen_length", "block_length", "steps"
MEMORY = {"batch": 8, "length": 1024, "vocab_size": 126_464}


@dataclass
class Row:
    """One way to make the same tokens. seconds: of whole runs, in rounds. ratio: LLaDA's time in fp32 over this one's,
    with the 20th and 80th percentile of the rounds; ratio_own: its time in the same dtype. equal: the share of tokens
    that are those of LLaDA's code in the same dtype."""

    name: str
    dtype: str
    seconds: list[float]
    equal: float
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    ratio_own: float | None = None


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    with quiet(), importable(options.llada, ("generate",)):
        published = importlib.import_module("generate")
    console, device = Console(stderr=True, width=140), torch.device(options.device)
    rows = measure(options, published, console)
    memory = {} if options.no_memory or device.type == "cuda" else _memory(options)
    given = sys.argv[1:] if arguments is None else arguments
    content = {
        "kind": KIND,
        "schema": 1,
        "partial": False,
        "command": command("benchmarks", ["greedy", *given]),
        **describe(device),
        "shape": SMOL._replace(num_blocks=options.blocks)._asdict(),
        "request": {
            name: getattr(options, name) for name in ("batch", "prompt", "gen_length", "block_length", "steps")
        },
        "rows": [asdict(row) for row in rows],
        "memory": memory,
    }
    if options.out:
        write(options.out, content)
    _show(rows, memory, console)
    return 0


def measure(options: argparse.Namespace, published: ModuleType, console: Console) -> list[Row]:
    """All variants in turn, the peer's code first."""
    length = options.prompt + options.gen_length
    prompt = torch.randint(SMOL.vocab_size - 1, (options.batch, options.prompt), generator=torch.manual_seed(0))
    prompt = prompt.to(options.device)
    runs: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for dtype in options.dtype:
        module = PlainLlama(SMOL._replace(num_blocks=options.blocks), length).to(options.device, DTYPES[dtype])
        runs |= {(name, dtype): run for name, run in _variants(module, prompt, published, options)}
    protocol, seconds, tokens = Paired(options.rounds), {key: [] for key in runs}, {}
    keys = {" ".join(key): key for key in runs}
    for turn in protocol.turns(list(keys)):
        key = keys[turn.name]
        taken = host_clock(lambda key=key: tokens.__setitem__(key, runs[key]().cpu()))  # the copy waits for a GPU
        if turn.timed:
            seconds[key].append(taken)
        console.print(f"{turn.name}: {taken:.1f} s{'' if turn.timed else ' (warm-up)'}", style="dim", highlight=False)
    return [_row(key, seconds, tokens, protocol, options.prompt) for key in runs]


def _variants(module: PlainLlama, prompt: Tensor, published: ModuleType, options: argparse.Namespace):
    sizes = {"steps": options.steps, "gen_length": options.gen_length, "block_length": options.block_length}
    mask_id = SMOL.vocab_size - 1
    yield "LLaDA", lambda: published.generate(module, prompt, mask_id=mask_id, **sizes)
    yield "unmask", lambda: llada.generate(module, prompt, mask_id=mask_id, **sizes)
    steps = options.steps * options.block_length // options.gen_length
    policy = Blocks(Confidence(steps=steps, untempered=True), options.block_length)
    choose, length = Categorical(0.0, draw_mask=True), prompt.shape[1] + options.gen_length
    for name, caching in CACHES.items():
        sampler = Sampler(wrap(module), reveal=policy, choose=choose, caching=caching, max_batch=len(prompt))
        yield name, lambda s=sampler: s.sample(len(prompt), length, prompt=prompt.tolist()).tokens


def _row(key: tuple[str, str], seconds: dict, tokens: dict, protocol: Paired, prompt: int) -> Row:
    name, dtype = key
    theirs = tokens["LLaDA", dtype]
    row = Row(name, dtype, seconds[key], float((tokens[key] == theirs)[:, prompt:].double().mean()))
    if name != "LLaDA":
        row.ratio_own = protocol.ratio(seconds[key], seconds["LLaDA", dtype]).value
        if ("LLaDA", "float32") in seconds:
            row.ratio, row.low, row.high = protocol.ratio(seconds[key], seconds["LLaDA", "float32"])
    return row


def _memory(options: argparse.Namespace) -> dict:
    """Bytes beyond the weights: of ours at the full size, of LLaDA's code with one sequence, whose logits alone would
    not fit here at the full size."""
    shared = {"threads": options.threads, **MEMORY}
    return {
        **MEMORY,
        "logits_in_fp64": MEMORY["batch"] * MEMORY["length"] * MEMORY["vocab_size"] * 8,
        "unmask": in_a_process("benchmarks.greedy_memory", **shared),
        "unmask_one_sequence": in_a_process("benchmarks.greedy_memory", **shared | {"batch": 1}),
        "llada_one_sequence": in_a_process(
            "benchmarks.greedy_memory", **shared | {"batch": 1}, checkout=str(options.llada.absolute())
        ),
    }


def _show(rows: list[Row], memory: dict, console: Console) -> None:
    table = Table("", "dtype", "seconds", "x LLaDA fp32", "x LLaDA, same dtype", "same tokens", box=None)
    for row in rows:
        middle = statistics.median(row.seconds)
        bounds = "" if row.low is None else f" ({row.low:.2f} to {row.high:.2f})"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}{bounds}"
        own = "" if row.ratio_own is None else f"{row.ratio_own:.2f}"
        table.add_row(row.name, row.dtype, f"{middle:.2f}", ratio, own, f"{row.equal:.1%}")
    console.print(table)
    for name, number in memory.items():
        console.print(f"{name}: {number}" if name in MEMORY else f"{name}: {(number or 0) / 1e6:,.0f} MB")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks greedy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--llada", type=Path, required=True, metavar="PATH", help=CHECKOUT.source)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of the timed runs; memory is measured on a CPU only")
    add("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (default: torch's choice)")
    add("--dtype", action="append", choices=DTYPES, help="give it once for each (default: both)")
    add("--blocks", type=count, default=SMOL.num_blocks, help="transformer blocks (default: 30)")
    add("--batch", type=count, default=1, help="prompts (default: 1)")
    add("--prompt", type=count, default=64, help="tokens of a prompt (default: 64)")
    add("--gen-length", type=count, default=128, help="tokens to generate (default: 128)")
    add("--block-length", type=count, default=32, help="tokens of a block (default: 32)")
    add("--steps", type=count, default=128, help="in all (default: 128)")
    add("--rounds", type=count, default=3, help="timed runs of each (default: 3)")
    add("--no-memory", action="store_true", help="leave the memory out")
    add("--out", type=Path, metavar="FILE.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    options.dtype = list(dict.fromkeys(options.dtype or DTYPES))
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    if why := CHECKOUT.incomplete(options.llada):
        sys.exit(why)
    return options


if __name__ == "__main__":
    sys.exit(main())
