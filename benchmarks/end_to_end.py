"""Times whole sampling runs beside what a user would sample with instead, on the same weights and machine, in one run.

    python -m benchmarks peers --threads 2 --mdlm PATH --bd3lms PATH --llada PATH --dream PATH --out results.json

Peers are other projects' own code, each from a path given here, and the straightforward loop under torch.compile; one
that is missing is left out. A peer is compared with ours under the reveal policy of the same law, and both are checked
against that law first, on a network so small that it can be counted; one that fails gets no ratio. The table goes to
standard error, the JSON to the file, also while it grows.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.arguments import count, names
from benchmarks.end_to_end_report import EndToEndReport, Section, Variant
from benchmarks.machine import command, describe
from benchmarks.peers import ours
from benchmarks.peers.run import Run
from benchmarks.peers.samplers import PEERS, SamplerPeer
from benchmarks.protocol import PROTOCOLS
from benchmarks.text_law import check, tiny_job
from benchmarks.timing import Clock, host_clock
from benchmarks.verify import Verdict
from benchmarks.workloads import WORKLOADS, sized, workload
from unmask.reveal import Reveal

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
CHECKOUTS = {peer.checkout.option: peer.checkout for peer in PEERS.values() if peer.checkout}
_WIDTH = 200


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    given = sys.argv[1:] if arguments is None else arguments
    report = EndToEndReport(command("benchmarks", ["peers", *given]), describe(device), options.protocol)
    console = Console(stderr=True)
    console.width = max(console.width, _WIDTH)
    try:
        report.save(options.out)  # a path that cannot be written is told before anything is measured
    except OSError as error:
        sys.exit(f"--out {options.out}: {error.strerror or error}")
    try:
        EndToEnd(options, device, report, console).run()
        report.partial = bool(report.failures)
    except KeyboardInterrupt:
        console.print("interrupted")
    report.save(options.out)
    report.show(console)
    return int(report.partial)


class EndToEnd:
    """All workloads on one device."""

    def __init__(self, options: argparse.Namespace, device: torch.device, report: EndToEndReport, console: Console):
        self.options, self.device, self.report, self.console = options, device, report, console
        self.dtype = getattr(torch, options.dtype)
        self.tiny = tiny_job(device)
        self.verdicts: dict[str, Verdict] = {}

    def run(self) -> None:
        for name in self.options.workload:
            if time.monotonic() > self.options.deadline:
                self.report.failures.append(f"the budget of {self.options.budget:g} s was spent before {name}")
                return
            with self.console.status(name) as status:
                Workload(self, name, status.update).run()
        if not any(section.variants for section in self.report.sections):
            self.report.failures.append("nothing was compared: every peer is left out")

    def path(self, peer: SamplerPeer) -> Path | None:
        """Of its checkout, as given."""
        return getattr(self.options, peer.checkout.option) if peer.checkout else None

    def verdict(self, name: str, reveal: Reveal, prepare: Callable[[], Run]) -> Verdict:
        """On the law of a sampler in the tiny job, checked once."""
        if name not in self.verdicts:
            self.verdicts[name] = check(prepare(), self.tiny, reveal)
        return self.verdicts[name]


class Workload:
    """One workload: every peer, and ours once for each law."""

    def __init__(self, bench: EndToEnd, name: str, tell: Callable[[str], object]):
        size = bench.options.sizes[name]
        self.bench, self.name, self.tell = bench, name, tell
        self.job = workload(name, size, bench.dtype, bench.device)
        vocab_size = self.job.network.shape.vocab_size
        self.section = Section(name, bench.device.type, bench.options.dtype, size, vocab_size)
        self.runs: dict[str, Run] = {}
        bench.report.sections.append(self.section)

    def run(self) -> None:
        for name in self.bench.options.peer:
            self.tell(f"{self.name}: checking and setting up {name}")
            peer = PEERS[name]
            if why := peer.lacks(self.job, self.bench.path(peer)):
                self.skip(name, why)
                continue
            try:
                variant, run = self.theirs(name, peer)
            except Exception as error:  # another project's code, with this machine's versions of its packages
                self.skip(name, _said(error))
                continue
            variant.ours = self.ours(peer)
            self.add(variant, run)
        self.time()

    def add(self, variant: Variant, run: Run) -> None:
        self.section.variants.append(variant)
        self.runs[variant.name] = run

    def skip(self, name: str, why: str) -> None:
        self.bench.report.skipped.append({"peer": name, "workload": self.name, "reason": why})

    def theirs(self, name: str, peer: SamplerPeer) -> tuple[Variant, Run]:
        bench, job, path = self.bench, self.job, self.bench.path(peer)
        verdict = bench.verdict(name, peer.reveal(bench.tiny), lambda: peer.prepare(bench.tiny, path))
        run = peer.prepare(job, path)
        logit_bytes = peer.logit_bytes or job.dtype.itemsize
        return self.variant(name, run, run.calls(), peer, verdict, peer.law, logit_bytes), run

    def ours(self, peer: SamplerPeer) -> Variant:
        """Of the peer's law; set up if it is not there."""
        bench, reveal = self.bench, peer.reveal(self.job)
        name = f"unmask {label(reveal)}"
        known = [variant for variant in self.section.variants if variant.name == name]
        if known:
            return known[0]
        tiny = peer.reveal(bench.tiny)
        verdict = bench.verdict(str(tiny), tiny, lambda: ours.prepare(bench.tiny, tiny))
        if not verdict.passed:
            bench.report.failures.append(f"{name} fails its law check: {verdict.detail}")
        run = ours.prepare(self.job, reveal)
        variant = self.variant(name, run, run.calls(), peer, verdict, "exact to 2⁻³⁰ of a row's mass", 0)
        self.add(variant, run)
        return variant

    def variant(
        self, name: str, run: Run, calls: float, peer: SamplerPeer, verdict: Verdict, law: str, logit_bytes: int
    ) -> Variant:
        size = self.job.size
        sequences, reveals = run.num_sequences or size.batch, run.num_reveals or size.length
        return Variant(
            name=name,
            reveal=label(peer.reveal(self.job)),
            sequences=sequences,
            reveals=reveals,
            law=f"{verdict.detail}; {law}",
            law_passed=verdict.passed,
            logits_bytes=logit_bytes * sequences * size.length * self.section.vocab_size,
            nfe=calls * size.length / reveals,
        )

    def time(self) -> None:
        variants = {variant.name: variant for variant in self.section.variants}
        clock, options = whole_clock(self.bench.device), self.bench.options
        for name, timed in options.protocol.turns(list(variants)):
            variant = variants[name]
            spent = variant.seconds and time.monotonic() > options.deadline
            if variant not in self.section.variants or spent:
                continue
            self.tell(f"{self.name}: {name}, {f'run {len(variant.seconds) + 1}' if timed else 'warm-up'}")
            try:
                seconds = clock(self.runs[name].generate)
            except Exception as error:
                if variant.ours is None:
                    raise
                self.skip(name, _said(error))
                self.section.variants.remove(variant)
                continue
            if timed:
                variant.seconds.append(seconds)
                self.bench.report.save(options.out)


def whole_clock(device: torch.device) -> Clock:
    """Seconds by the host's clock, a GPU waited for before and after."""
    if device.type != "cuda":
        return host_clock

    def clock(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        return host_clock(lambda: (run(), torch.cuda.synchronize()))

    return clock


def label(reveal: Reveal) -> str:
    """Its spelling, but for the numbers of a grid."""
    kind, *rest = str(reveal).split(":")
    return ":".join([kind, *rest[:1]]) + (" own grid" if len(rest) > 1 else "")


def _said(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peer", action="extend", type=names(PEERS), help=f"some of {','.join(PEERS)}; default: all")
    add("--workload", action="extend", type=names(WORKLOADS), help=f"some of {','.join(WORKLOADS)}; default: all")
    add("--device", choices=DTYPES, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=sorted(set(DTYPES.values())), help="of the products; default: float32, on a GPU bfloat16")
    add("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (default: torch's choice)")
    add("--batch", type=count, help="sequences of a run (default: the workload's on this device)")
    add("--length", type=count, help="tokens of a sequence (default: the workload's)")
    add("--steps", type=count, help="of the trajectory (default: the workload's)")
    add("--protocol", choices=PROTOCOLS, default="paired", help="rounds of all in turn, or one after the other")
    add("--rounds", type=count, help="timed runs of each (default: 5 paired, 10 with latency_sample)")
    add("--budget", type=float, default=float("inf"), help="seconds after which each only gets the one run it lacks")
    for option, checkout in CHECKOUTS.items():
        add(f"--{option}", type=Path, metavar="PATH", help=checkout.source)
    add("--out", type=Path, metavar="FILE.json", help="where the JSON goes, also while it grows")
    options = parser.parse_args(arguments)
    return _checked(options)


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    """Filled in by the device; ends the program where something given is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    for option, checkout in CHECKOUTS.items():
        if (path := getattr(options, option)) and (why := checkout.incomplete(path)):
            sys.exit(why)
    options.peer = list(dict.fromkeys(options.peer or PEERS))
    options.workload = list(dict.fromkeys(options.workload or WORKLOADS))
    options.dtype = options.dtype or DTYPES[options.device]
    rounds = {"rounds": options.rounds} if options.rounds else {}
    options.protocol = PROTOCOLS[options.protocol](**rounds)
    options.deadline = time.monotonic() + options.budget
    given = {"batch": options.batch, "length": options.length, "num_steps": options.steps}
    try:
        options.sizes = {
            name: sized(name, options.device, **{field: value for field, value in given.items() if value})
            for name in options.workload
        }
    except ValueError as error:
        sys.exit(str(error))
    absent = {
        name: why
        for name in options.peer
        if (one := PEERS[name].checkout) and (why := one.lacks(getattr(options, one.option)))
    }
    if len(absent) == len(options.peer):
        sys.exit("no peer to compare with: " + "; ".join(f"{name} {why}" for name, why in absent.items()))
    return options


if __name__ == "__main__":
    sys.exit(main())
