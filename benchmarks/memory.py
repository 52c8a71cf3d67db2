"""How much memory a draw takes beyond its inputs: measured in a process of its own on a CPU, by torch on a GPU."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import HeadCase, Shape, head_case, head_weight
from benchmarks.machine import ROOT
from benchmarks.samplers import Draw, head_samplers

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TIMEOUT = 300


def on_gpu(case: HeadCase, draw: Draw) -> int:
    """Peak of torch's allocator above what it held before the draw. Allocations by an extension itself are not seen."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    draw(case.hidden, case.weight, case.keys)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_cpu(name: str, case: HeadCase) -> int | None:
    """Peak resident memory above what the process held before the draw, whoever allocated it; None where not to be had.

    To within a megabyte: the system counts pages.
    """
    request = {
        "name": name,
        "part": case.part,
        "shape": case.shape,
        "dtype": str(case.hidden.dtype).removeprefix("torch."),
        "rows": case.num_rows,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(request)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return None


def _answer(name: str, part: str, shape: list[int], dtype: str, rows: int, threads: int) -> int:
    torch.set_num_threads(threads)
    draw = next(sampler.draw for sampler in head_samplers(part, "cpu") if sampler.name == name)
    wanted, small = Shape(*shape), Shape(shape[0], 300)  # the small one loads code and starts threads
    for size, num_rows in ((small, 2 * threads), (wanted, rows)):
        case = head_case(part, size, head_weight(size, getattr(torch, dtype), torch.device("cpu")), num_rows)
        ctypes.CDLL(None).malloc_trim(0)  # pages that malloc keeps would be used again uncounted
        _RESET.write_text("5")  # the peak starts again from here
        before = _kilobytes("VmRSS")
        draw(case.hidden, case.weight, case.keys)
    return (_kilobytes("VmHWM") - before) << 10


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))


if __name__ == "__main__":
    print(_answer(**json.loads(sys.argv[1])))
