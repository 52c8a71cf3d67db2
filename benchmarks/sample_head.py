"""Times sample_head: every implementation that serves here, beside its peers and this machine's measured ceilings.

    python -m benchmarks.sample_head --device cpu --threads 2 --out results.json

The table goes to standard error, the JSON to --out. A sampler that fails the law check gets no speed.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import memory, verify
from benchmarks.arguments import count, counts, names
from benchmarks.cases import PARTS, SHAPES, HeadCase, Shape, head_case, head_weight
from benchmarks.ceilings import Ceilings, measure, readers
from benchmarks.machine import command, describe
from benchmarks.peers.torch_chain import head_alone
from benchmarks.report import Report, Row, with_ratios
from benchmarks.samplers import Sampler, head_samplers
from benchmarks.timing import Effort, Flush, Run, Timing, capture, clock, interleave
from unmask.kernels.noise import BLOCK

DTYPES = "float32", "bfloat16", "float16"
DEFAULTS = {
    "cpu": {"dtype": "float32,bfloat16", "rows": "1,8,32,128", "shape": ["mdlm-small"]},
    "cuda": {"dtype": "bfloat16", "rows": "1,8,32,64,128,256,1024,8192,65536", "shape": list(SHAPES)},
}
_GRAPH_BELOW = 2e-3  # seconds; in a longer run the launches do not show
_WIDTH = 220  # of the table; a narrower terminal wraps its lines
_MOST_LOGITS = 1 << 31  # given logits: 8 GiB in fp32


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    report = Report(command("benchmarks.sample_head", arguments), describe(device))
    console = Console(stderr=True)
    console.width = max(console.width, _WIDTH)
    try:
        for dtype, shape in product(options.dtype, options.shape):
            try:
                HeadBench(options, device, getattr(torch, dtype), shape, report, console).run()
            except (RuntimeError, MemoryError, TimeoutError) as error:
                report.failures.append(f"{dtype} {tuple(shape)}: {type(error).__name__}: {error}")
        report.partial = bool(report.failures)
    except KeyboardInterrupt:
        console.print("interrupted")
    report.save(options.out)
    report.show(console)
    return int(report.partial)


@dataclass(frozen=True)
class Variant:
    """Something timed; `rehearse` runs its code on next to no data."""

    run: Run
    rehearse: Run


class HeadBench:
    """All sizes of one shape in one dtype."""

    def __init__(
        self,
        options: argparse.Namespace,
        device: torch.device,
        dtype: torch.dtype,
        shape: Shape,
        report: Report,
        console: Console,
    ):
        self.options, self.device, self.shape, self.report, self.console = options, device, shape, report, console
        self.effort, self.flush = Effort(seconds=options.seconds), Flush(device)
        self.weight = head_weight(shape, dtype, device)
        tiny = shape._replace(vocab_size=BLOCK)
        self.tiny = {part: head_case(part, tiny, head_weight(tiny, dtype, device), 1) for part in PARTS}
        self.laws: dict[tuple[str, str], verify.Verdict] = {}
        self.expected: dict[tuple[str, str], float] = {}  # seconds of a row

    def run(self) -> None:
        ceilings = measure(self.device, self.weight.dtype, self.weight.nbytes, self.effort)
        self.report.ceilings.append(ceilings)
        for part, num_rows in product(PARTS, self.options.rows):
            if part == "sampling" and num_rows * self.shape.vocab_size > _MOST_LOGITS:
                continue
            if time.monotonic() > self.options.deadline:
                raise TimeoutError(f"the budget of {self.options.budget:g} s was spent before {part}, R = {num_rows:,}")
            self.console.print(f"{part} {self.weight.dtype} {tuple(self.shape)} R = {num_rows:,}", style="dim")
            case = head_case(part, self.shape, self.weight, num_rows)
            self.report.rows += self.time(case, ceilings)
            self.report.save(self.options.out)

    def time(self, case: HeadCase, ceilings: Ceilings) -> list[tuple[Row, Ceilings]]:
        """A row for every sampler, timed or with the reason why not, and for what is timed beside them."""
        samplers = {sampler.name: sampler for sampler in head_samplers(case.part, self.device.type)}
        rows, variants = [], {}
        for row, variant in [
            *(self.admit(sampler, case) for sampler in samplers.values()),
            *self.beside(case, ceilings),
        ]:
            rows.append(row)
            if variant is not None:
                variants[row.variant] = variant
        found = self.measure(variants)
        rows = [replace(row, **found.get(row.variant, {})) for row in rows]
        if self.options.memory and case.num_rows == max(self.options.rows):
            rows = [self.weigh(row, case, samplers[row.variant]) if row.variant in samplers else row for row in rows]
        self.expected |= {(case.part, row.variant): row.seconds / case.num_rows for row in rows if row.seconds}
        reads = [row.num_bytes / row.seconds for row in rows if row.kind == "ceiling"]
        ceilings = replace(ceilings, bandwidth=max([ceilings.bandwidth, *reads]))
        return [(row, ceilings) for row in with_ratios(rows)]

    def admit(self, sampler: Sampler, case: HeadCase) -> tuple[Row, Variant | None]:
        """The sampler's row, and what to time if it may be timed."""
        row = self.row(case, sampler.name, sampler.kind)
        if sampler.lacks:
            return replace(row, note=sampler.lacks), None
        expected = self.expected.get((case.part, sampler.name), 0) * case.num_rows
        if expected > self.options.limit:
            return replace(row, note=f"left out: would take up to {expected:.1f} s"), None
        try:
            verdict = self.verdict(sampler, case)
        except (RuntimeError, ValueError) as error:
            return replace(row, note=f"{type(error).__name__}: {str(error).splitlines()[0]}"), None
        if not verdict.passed and sampler.kind == "implementation":
            return replace(row, law=f"FAILS: {verdict.detail}", note="so its speed is not shown"), None
        row = replace(row, law=verdict.detail if verdict.passed else f"fails: {verdict.detail}")
        tiny = self.tiny[case.part]
        return row, Variant(
            lambda: sampler.draw(case.hidden, case.weight, case.keys),
            lambda: sampler.draw(tiny.hidden, tiny.weight, tiny.keys),
        )

    def verdict(self, sampler: Sampler, case: HeadCase) -> verify.Verdict:
        """Of the law, drawn once for all sizes, and for an implementation of its tokens at this size."""
        known = case.part, sampler.name
        if known not in self.laws:
            self.laws[known] = verify.check_law(
                sampler.draw, case.part, self.shape, self.weight.dtype, self.device, self.options.draws
            )
        law, tokens = self.laws[known], sampler.draw(case.hidden, case.weight, case.keys)
        if not law.passed or sampler.kind == "peer":
            return law
        same = verify.check_tokens(case, tokens)
        return verify.Verdict(same.passed, f"{law.detail}, {same.detail}" if same.passed else same.detail)

    def beside(self, case: HeadCase, ceilings: Ceilings) -> list[tuple[Row, Variant]]:
        """The product alone, and on a CPU a read of the weight, timed in the same rounds."""
        if case.weight is None:
            return []
        tiny = self.tiny[case.part]
        head = self.row(case, "torch, head alone", "part")
        logits = case.num_rows * case.shape.vocab_size * case.weight.itemsize
        head = replace(head, num_bytes=case.weight.nbytes + case.hidden.nbytes + logits)
        run = Variant(lambda: head_alone(case.hidden, case.weight), lambda: head_alone(tiny.hidden, tiny.weight))
        if self.device.type != "cpu":
            return [(head, run)]
        read = self.row(case, f"read of the weight ({ceilings.by})", "ceiling")
        read = replace(read, num_bytes=case.weight.nbytes, flops=0)
        return [(head, run), (read, Variant(*(readers(tensor)[ceilings.by] for tensor in (case.weight, tiny.weight))))]

    def measure(self, variants: dict[str, Variant]) -> dict[str, dict[str, Timing | str]]:
        """Fields of the rows: cold, warm, graph, or a note where no graph can be captured."""

        def cool(name: str) -> None:
            """Data out of the cache; on a CPU, whose flush drives out code too, that back into it."""
            self.flush()
            if self.device.type == "cpu":
                variants[name].rehearse()

        runs = {name: variant.run for name, variant in variants.items()}
        cold = interleave(runs, clock(self.device), self.effort, cool)
        warm = interleave(runs, clock(self.device), self.effort, lambda name: runs[name]())
        found = {name: {"cold": cold[name], "warm": warm[name]} for name in runs}
        replays = {}
        for name, run in runs.items():
            if self.device.type == "cuda" and warm[name].median < _GRAPH_BELOW:
                try:
                    replays[name] = capture(run)
                except RuntimeError as error:
                    found[name]["note"] = f"no graph: {str(error).splitlines()[0]}"
        for name, timing in interleave(replays, clock(self.device), self.effort, cool).items():
            found[name]["graph"] = timing
        return found

    def weigh(self, row: Row, case: HeadCase, sampler: Sampler) -> Row:
        if row.seconds is None:
            return row
        if self.device.type == "cpu":
            return replace(row, memory=memory.on_cpu(row.variant, case))
        return replace(row, memory=memory.on_gpu(lambda: sampler.draw(case.hidden, case.weight, case.keys)))

    def row(self, case: HeadCase, variant: str, kind: str) -> Row:
        return Row(
            operator="sample_head",
            part=case.part,
            variant=variant,
            kind=kind,
            device=self.device.type,
            dtype=str(self.weight.dtype).removeprefix("torch."),
            hidden_size=self.shape.hidden_size,
            vocab_size=self.shape.vocab_size,
            num_rows=case.num_rows,
            num_bytes=case.num_bytes,
            flops=case.flops,
        )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sample_head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", type=names(DTYPES), help=f"some of {','.join(DTYPES)}; default: what the device is for")
    add("--rows", type=counts, help="numbers of rows, as in 1,8,32")
    add("--shape", type=_shape, action="append", metavar="D,V", help=f"or one of {', '.join(SHAPES)}; may be repeated")
    add("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (default: torch's choice)")
    add("--out", type=Path, metavar="FILE.json", help="where the JSON goes, also while it grows")
    add("--draws", type=count, default=200_000, help="draws of the law check (default: 200000)")
    add("--seconds", type=float, default=0.5, help="time given to a variant at each size (default: 0.5)")
    add("--limit", type=float, default=1.0, help="leave a variant out where one run would take longer (default: 1 s)")
    add("--budget", type=float, default=float("inf"), help="seconds after which no new size is begun")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the memory of the largest size")
    options = parser.parse_args(arguments)
    defaults = DEFAULTS[options.device]
    options.dtype = options.dtype or names(DTYPES)(defaults["dtype"])
    options.rows = options.rows or counts(defaults["rows"])
    options.shape = options.shape or [SHAPES[name] for name in defaults["shape"]]
    options.deadline = time.monotonic() + options.budget
    return options


def _shape(text: str) -> Shape:
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split(",")
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"must be D,V or one of {', '.join(SHAPES)}, got {text!r}")
    return Shape(*map(count, sizes))


if __name__ == "__main__":
    sys.exit(main())
