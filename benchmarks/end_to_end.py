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
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.arguments import count, names
from benchmarks.end_to_end_report import EndToEndReport
from benchmarks.machine import command, describe
from benchmarks.peers.samplers import PEERS
from benchmarks.protocol import PROTOCOLS
from benchmarks.text_law import Laws
from benchmarks.whole_runs import WholeRuns
from benchmarks.workloads import WORKLOADS, sized, workload
from unmask.files import check_file

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
        run(options, device, report, console)
        report.partial = bool(report.failures)
    except KeyboardInterrupt:
        console.print("interrupted")
    report.save(options.out)  # nothing where nothing was measured: what stands there may be worth more
    report.show(console)
    return int(report.partial)


def run(options: argparse.Namespace, device: torch.device, report: EndToEndReport, console: Console) -> None:
    """All workloads, one after the other."""
    laws = Laws(device)
    for name in options.workload:
        if time.monotonic() > options.deadline:
            report.failures.append(f"the budget of {options.budget:g} s was spent before {name}")
            return
        job = workload(name, options.sizes[name], getattr(torch, options.dtype), device)
        with console.status(name) as status:
            tell = status.update if console.is_terminal else partial(console.print, style="dim", highlight=False)
            runs = WholeRuns(name, job, laws, report, tell)
            runs.set_up(options.peer, options.paths)
            runs.time(options.deadline, options.out)
    if not any(variant.ours for section in report.sections for variant in section.variants):
        report.failures.append("nothing was compared: every peer is left out")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers",
        usage="python -m benchmarks peers [options], see --help",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    if options.out:
        try:
            check_file("out", options.out)
        except OSError as error:
            sys.exit(f"--{error}")
    options.paths = {option: getattr(options, option) for option in CHECKOUTS}
    for option, path in options.paths.items():
        if path and (why := CHECKOUTS[option].incomplete(path)):
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
    checkouts = {name: PEERS[name].checkout for name in options.peer}
    absent = {name: one.lacks(options.paths[one.option]) for name, one in checkouts.items() if one}
    if all(absent.get(name) for name in options.peer):
        sys.exit("no peer to compare with: " + "; ".join(f"{name} {why}" for name, why in absent.items()))
    return options


if __name__ == "__main__":
    sys.exit(main())
