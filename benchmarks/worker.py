"""Trials in a process of their own, with the kernels of this checkout or of another.

The process reads one JSON object a line: a point to open, or a share of time to measure; it answers each with one.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch

import unmask
from benchmarks import ROOT
from benchmarks.base import BaseError
from benchmarks.cases import Point
from benchmarks.rows import Row
from benchmarks.shapes import Shape
from benchmarks.trial import Seconds, Settings, Timer, one_line

# Of an installation in place only the folders count that the path names: what another commit lacks is not to be found
# in this one.
_START = """
import runpy, sys
if {alone}:
    sys.meta_path[:] = [one for one in sys.meta_path if "editable___unmask" not in getattr(one, "__module__", "")]
sys.argv[0] = "benchmarks.worker"
runpy.run_module("benchmarks.worker", run_name="__main__")
"""


class Worker:
    """A `Timer` of another process, one case at a time. `packages`: where that process finds `unmask`; None: as this
    one does. A context manager."""

    def __init__(self, packages: Path | None, device: torch.device, settings: Settings):
        self.packages = packages
        request = asdict(settings) | {"impl": settings.impl and sorted(settings.impl)}
        self.request = {"device": str(device), "threads": torch.get_num_threads(), "settings": request}

    def __enter__(self) -> "Worker":
        environment = dict(os.environ)
        if self.packages is not None:
            environment["PYTHONPATH"] = os.pathsep.join(
                [str(self.packages), *filter(None, [environment.get("PYTHONPATH")])]
            )
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(alone=self.packages is not None), json.dumps(self.request)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        try:
            found = Path(self.answer()["unmask"])
            if self.packages is not None and not found.is_relative_to(self.packages):
                raise BaseError(f"its process found another unmask, {found}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def open(self, point: Point, dtype: torch.dtype) -> "Worker":
        found = self.ask(point=asdict(point), dtype=str(dtype).removeprefix("torch."))
        self.rows = {name: Row(**row) for name, row in found.items()}
        return self

    def measure(self, share: float) -> tuple[Seconds, dict[str, str]]:
        return tuple(self.ask(share=share))

    def ask(self, **request: object) -> dict | list:
        with suppress(BrokenPipeError):  # the answer tells why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict | list:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            said = self.log.read().strip().splitlines()
            raise BaseError(f"its process ended: {said[-1] if said else 'without a word'}")
        found = json.loads(line)
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(found["error"])
        return found


def serve(requests: TextIO, answers: TextIO, timer: Timer) -> None:
    """Until the requests end."""
    trial = None
    for line in requests:
        request = json.loads(line)
        try:
            if "point" in request:
                trial = None  # its tensors go before the next ones come
                point = Point(**request["point"] | {"shape": Shape(*request["point"]["shape"])})
                trial = timer.open(point, getattr(torch, request["dtype"]))
                found = {name: asdict(row) for name, row in trial.rows.items()}
            else:
                found = trial.measure(request["share"])
        except Exception as error:  # whatever the kernels of another commit, or calls that they do not know, raise
            found = {"error": one_line(error)}
        print(json.dumps(found), file=answers, flush=True)


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    settings = request["settings"]
    settings["impl"] = settings["impl"] and frozenset(settings["impl"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    print(json.dumps({"unmask": unmask.__file__}), file=answers, flush=True)
    serve(sys.stdin, answers, Timer(torch.device(request["device"]), Settings(**settings)))


if __name__ == "__main__":
    main()
