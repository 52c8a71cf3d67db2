"""How much memory something takes beyond its inputs: measured in a process of its own on a CPU, by torch on a GPU."""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.cases import Point
from benchmarks.shapes import Shape
from benchmarks.variants import beside, implementations

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TIMEOUT = 300


def on_gpu(run: Callable[[], object]) -> int:
    """Peak of torch's allocator above what it held before the run. Allocations by an extension itself are not seen."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_cpu(point: Point, dtype: torch.dtype, variant: str) -> int | None:
    """Of a run of the variant of that name, see `in_a_process`."""
    return in_a_process(
        "benchmarks.memory",
        point=asdict(point),
        dtype=str(dtype).removeprefix("torch."),
        variant=variant,
        threads=torch.get_num_threads(),
    )


def in_a_process(module: str, **request: object) -> int | None:
    """The number of bytes that a module's own process prints when asked; None where there is none to be had."""
    command = [sys.executable, "-m", module, json.dumps(request)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return None


def peak(run: Callable[[], object]) -> int:
    """Peak resident memory above what this process held before the run, whoever allocated it.

    To within a megabyte: the system counts pages. Code is loaded and threads are started by an earlier, smaller run.
    """
    ctypes.CDLL(None).malloc_trim(0)  # pages that malloc keeps would be used again uncounted
    _RESET.write_text("5")  # the peak starts again from here
    before = _kilobytes("VmRSS")
    run()
    return (_kilobytes("VmHWM") - before) << 10


def _answer(point: dict, dtype: str, variant: str, threads: int) -> int:
    torch.set_num_threads(threads)
    point = Point(**point | {"shape": Shape(*point["shape"])})
    known = [*implementations(point.operator), *beside(point.operator, point.part, "cpu", read="sum")]
    bind = next(each.bind for each in known if each.name == variant)
    # First of as many rows as there are threads to start, of few ids.
    small = replace(point, shape=point.shape._replace(vocab_size=300), count=min(2 * threads, point.count))
    for each in (small, point):
        run = bind(each.prepare(getattr(torch, dtype), torch.device("cpu")))
        found = peak(run)
    return found


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))


if __name__ == "__main__":
    print(_answer(**json.loads(sys.argv[1])))
