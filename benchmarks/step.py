"""Times a denoising step and whole runs of MDLM, beside the published sampler where a checkout of it is given.

    python -m benchmarks.step --device cpu --threads 2 --mdlm PATH --out results.json

The published sampler is `ddpm_cache` of github.com/kuleshov-group/mdlm, run as it is with the same random weights (see
benchmarks/peers/mdlm.py). Cases:

    step    one step of a half-masked sequence: the network, and a token for each position that it reveals
    run     several sequences over a whole trajectory, from a few consecutive steps: seconds × network calls
    memory  of one step beyond the weights
    growth  whole runs of a small network with more and more steps, nothing extrapolated

Log-probabilities of both are compared first; where they differ no speed is shown. The table goes to standard error.
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import memory
from benchmarks.arguments import count, counts, names
from benchmarks.ceilings import Ceilings, measure
from benchmarks.machine import command, describe
from benchmarks.network import NETWORKS, denoiser, half_masked, random_tensors
from benchmarks.peers.mdlm import CHECKOUT, Published
from benchmarks.sides import Ours, Side, Step, Theirs
from benchmarks.step_report import TITLES, StepReport, StepRow, with_ratios
from benchmarks.ticks import OneTick
from benchmarks.timing import Effort, Run, capture, clock, interleave

DTYPES = "float32", "bfloat16"
DEFAULTS = {"cpu": (list(DTYPES), [1]), "cuda": (["bfloat16"], [1, 8, 64])}  # dtypes, batches of the case step
GROWTH = 1000, 4000, 16_000  # steps
# One step of MDLM-small at L = 1024 on an H200, by batch: ours and the published one, from bytes and FLOPs by hand.
ROOFLINE = {1: (0.340e-3, 1.55e-3), 8: (2.60e-3, 12.4e-3), 64: (20.7e-3, 99.1e-3)}
_COMPARED = 64  # positions whose log-probabilities are compared
_CLOSE = 1e-4
_BLOCK = 4  # steps that one side runs before it is the other's turn
_SPLITS = 3
_CPU = torch.device("cpu")
_WIDTH = 240


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    report = StepReport(command("benchmarks.step", arguments), describe(device))
    console = Console(stderr=True)
    console.width = max(console.width, _WIDTH)
    try:
        StepBench(options, device, report, console).run()
        report.partial = bool(report.failures)
    except KeyboardInterrupt:
        console.print("interrupted")
    except (RuntimeError, MemoryError, TimeoutError) as error:
        report.failures.append(f"{type(error).__name__}: {error}")
    report.save(options.out)
    report.show(console)
    return int(report.partial)


class StepBench:
    """All cases on one device, with one set of weights."""

    def __init__(self, options: argparse.Namespace, device: torch.device, report: StepReport, console: Console):
        self.options, self.device, self.report, self.console = options, device, report, console
        self.network = NETWORKS[options.network]
        self.tensors = random_tensors(self.network, device)
        self.ceilings: dict[str, Ceilings] = {}
        self.checks: dict[Side, str] = {}
        self.sides: list[Side] = []
        for dtype in (getattr(torch, name) for name in options.dtype):
            model = denoiser(self.network, self.tensors, dtype, device)
            self.sides.append(Ours(network=self.network, dtype=dtype, num_steps=options.num_steps, model=model))

    def run(self) -> None:
        if why := CHECKOUT.lacks(self.options.mdlm):
            self.say(f"the published sampler is left out: {why}")
        else:
            published = Published(self.options.mdlm, self.network, self.tensors, self.device)
            self.compare(published if self.device.type == "cpu" else self.published_on_cpu())
            # On a GPU it asks for bf16 by itself, whatever is around it.
            for dtype in (torch.float32, torch.bfloat16) if self.device.type == "cpu" else (torch.bfloat16,):
                side = {"network": self.network, "dtype": dtype, "num_steps": self.options.num_steps}
                self.sides.append(Theirs(**side, checkout=self.options.mdlm, published=published))
        for case in self.options.cases:
            if time.monotonic() > self.options.deadline:
                raise TimeoutError(f"the budget of {self.options.budget:g} s was spent before {TITLES[case]}")
            self.say(TITLES[case])
            rows = getattr(self, f"time_{case}")()
            self.report.rows += [(row, self.ceiling(row.dtype)) for row in with_ratios(rows)]
            self.report.save(self.options.out)

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False)

    def ceiling(self, dtype: str) -> Ceilings:
        """Measured once, with a read of as many bytes as the network's weights have in this dtype."""
        if dtype not in self.ceilings:
            weights = getattr(torch, dtype)
            num_bytes = sum(tensor.numel() for tensor in self.tensors.values()) * weights.itemsize
            self.ceilings[dtype] = measure(self.device, weights, num_bytes, Effort(seconds=1.0))
            self.report.ceilings.append(self.ceilings[dtype])
        return self.ceilings[dtype]

    def published_on_cpu(self) -> Published:
        tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        return Published(self.options.mdlm, self.network, tensors, _CPU)

    def compare(self, published: Published) -> None:
        """Our log-probabilities with the published ones in fp32, on a CPU: fp32 must be close, and bf16 as close as the
        published network in bf16. A side that is not is timed no further."""
        tokens = half_masked(self.network, 1, _CPU)
        exact, rounded = (published.log_probs(tokens, narrow)[0].float() for narrow in (False, True))
        for side in list(self.sides):
            tick = OneTick(side.model, tokens.to(self.device), min(_COMPARED, self.network.length // 4))
            rows, real = tick.batch.rows.cpu(), slice(self.network.mask_id)
            passed, found = _verdict(
                side.dtype, *(each[:, real] for each in (tick.log_probs(), exact[rows], rounded[rows]))
            )
            self.say(f"{side.precision}: {found}")
            self.checks[side] = found
            if not passed:
                self.report.failures.append(f"{side.precision}: {found}, so no speed is shown")
                self.sides.remove(side)

    # --- cases --------------------------------------------------------------------------------------------------------

    def time_step(self) -> list[StepRow]:
        return [row for batch in self.options.batch for row in self.steps_of(batch)]

    def steps_of(self, batch: int) -> list[StepRow]:
        tokens = half_masked(self.network, batch, self.device)
        steps = {side: side.step(tokens) for side in self.sides}
        runs, notes = {side: step.run for side, step in steps.items()}, {}
        if self.device.type == "cuda":
            runs |= {side: _replayed(runs[side], side, notes) for side in self.sides if side.kind == "implementation"}
        timings = interleave(runs, clock(self.device), Effort(1, 5, 30, self.options.seconds))
        rows = []
        for side, timing in timings.items():
            row = self.row("step", side, batch, batch * side.usual_rows, timing=timing, note=notes.get(side))
            if self.device.type == "cpu":
                row = replace(row, parts=_parts(steps[side]))
            elif batch in ROOFLINE:
                row = replace(row, roofline=ROOFLINE[batch][side.kind == "peer"])
            rows.append(row)
        return rows

    def time_run(self) -> list[StepRow]:
        batch, block = self.options.sequences, min(_BLOCK, self.options.steps)
        tokens = half_masked(self.network, batch, self.device)
        rounds = math.ceil(self.options.steps / block)
        runs = {side: partial(side.seconds, tokens, block) for side in self.sides}
        timings = interleave(runs, lambda run: run(), Effort(0, rounds, rounds))
        rows = []
        for side, timing in timings.items():
            calls, note = side.calls(batch)
            total = side.total(tokens, calls, timing.median)
            note = "; ".join(filter(None, (note, f"{rounds * block} steps timed")))
            num_rows = round(batch * self.network.length / calls)
            rows.append(self.row("run", side, batch, num_rows, timing=timing, calls=calls, total=total, note=note))
        return rows

    def time_memory(self) -> list[StepRow]:
        batch = self.options.sequences
        rows = []
        for side in self.sides:
            row = self.row("memory", side, batch, batch * side.usual_rows, memory=self.weigh(side, batch))
            rows.append(replace(row, predicted_memory=side.predicted_memory(batch)))
        return rows

    def weigh(self, side: Side, batch: int) -> int | None:
        if self.device.type == "cuda":
            tokens = half_masked(self.network, batch, self.device)
            return memory.on_gpu(lambda: side.seconds(tokens, 1))
        return memory.in_a_process(
            "benchmarks.step_memory",
            network=self.options.network,
            dtype=side.precision,
            num_steps=self.options.num_steps,
            batch=batch,
            threads=self.options.threads,
            checkout=side.checkout and str(side.checkout.resolve()),
        )

    def time_growth(self) -> list[StepRow]:
        """Whole runs, in the first dtype that is timed, of a network so narrow that they can be."""
        dtypes = [side.dtype for side in self.sides if side.kind == "implementation"]
        if not dtypes:
            return []
        network, dtype, batch = NETWORKS[self.options.narrow], dtypes[0], self.options.sequences
        model = denoiser(network, random_tensors(network, self.device), dtype, self.device)
        sides = [Ours(network=network, dtype=dtype, num_steps=num_steps, model=model) for num_steps in GROWTH]
        runs = {side: partial(side.sampler(batch).sample, batch, network.length) for side in sides}
        timings = interleave(runs, clock(self.device), Effort(1, 3, 9, self.options.seconds))
        rows = []
        for side, timing in timings.items():
            calls, note = side.calls(batch)
            num_rows = round(batch * network.length / calls)
            row = self.row("growth", side, batch, num_rows, calls=calls, total=timing.median, timing=timing)
            rows.append(replace(row, note=f"{note}; {network.shape.num_blocks} blocks of {network.shape.hidden_size}"))
        return rows

    def row(self, case: str, side: Side, batch: int, num_rows: int, **found: object) -> StepRow:
        return StepRow(
            case=case,
            variant=side.name,
            kind=side.kind,
            device=self.device.type,
            dtype=side.precision,
            batch=batch,
            length=side.network.length,
            num_steps=side.num_steps,
            num_rows=num_rows,
            passes=side.passes(batch, num_rows),
            check=self.checks.get(side),
            **found,
        )


def _verdict(dtype: torch.dtype, ours: Tensor, exact: Tensor, rounded: Tensor) -> tuple[bool, str]:
    """Whether log-probabilities are close enough to the published ones, and what was found."""
    if dtype is torch.float32:
        worst = (ours - exact).abs().max().item()
        return worst <= _CLOSE, f"log-probabilities within {worst:.1e} of the published"
    off, theirs = ((each - exact).square().mean().sqrt().item() for each in (ours, rounded))
    return off <= theirs, f"log-probabilities {off:.1e} (rms) from the published in fp32, its own in bf16 {theirs:.1e}"


def _replayed(run: Run, side: Side, notes: dict[Side, str]) -> Run:
    """As a CUDA graph, which is how a run makes its ticks; the run itself and a note where there can be none."""
    try:
        return capture(run)
    except RuntimeError as error:
        notes[side] = f"no graph: {str(error).splitlines()[0]}"
        return run


def _parts(step: Step) -> dict[str, float]:
    """Median seconds by part."""
    found = [step.split() for _ in range(_SPLITS)]
    return {part: statistics.median(one[part] for one in found) for part in found[0]}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--mdlm", type=Path, metavar="PATH", help="a checkout of github.com/kuleshov-group/mdlm")
    add("--cases", type=names(TITLES), default=list(TITLES), help=f"some of {','.join(TITLES)}; default: all")
    add("--dtype", type=names(DTYPES), help=f"of our weights, some of {','.join(DTYPES)}")
    add("--batch", type=counts, help="sequences of the case step, as in 1,8")
    add("--sequences", type=count, default=8, help="of the other cases (default: 8)")
    add("--num-steps", type=count, default=1000, help="of the trajectory (default: 1000)")
    add("--steps", type=count, default=32, help="of it that the case run times (default: 32)")
    add("--network", choices=NETWORKS, default="mdlm-small", help="default: mdlm-small")
    add("--narrow", choices=NETWORKS, default="narrow", help="network of the case growth (default: narrow)")
    add("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (default: torch's choice)")
    add("--seconds", type=float, default=10.0, help="time given to a variant, but a few runs (default: 10)")
    add("--budget", type=float, default=float("inf"), help="seconds after which no new case is begun")
    add("--out", type=Path, metavar="FILE.json", help="where the JSON goes, also while it grows")
    options = parser.parse_args(arguments)
    dtypes, batches = DEFAULTS[options.device]
    options.dtype, options.batch = options.dtype or dtypes, options.batch or batches
    options.deadline = time.monotonic() + options.budget
    return options


if __name__ == "__main__":
    sys.exit(main())
