"""Does a run fit? What is free on a device, and errors that say what was wanted and what would fit."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from unmask.timeline import Tick

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def available(device: torch.device) -> int | None:
    """Bytes that a program may still allocate there; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [size for size in (_of_machine(), _of_group()) if size is not None]
    return min(known, default=None)


def check(device: torch.device, max_batch: int, wanted: Callable[[int], int]) -> None:
    """Raise MemoryError unless the buffers of a run fit; wanted(max_batch) -> their bytes, growing with `max_batch`."""
    free = available(device)
    if free is None or wanted(max_batch) <= free:
        return
    fitting = bisect_right(range(1, max_batch), free, key=wanted)
    advice = f"max_batch={fitting} would fit" if fitting else f"one sequence at a time needs {_readable(wanted(1))}"
    raise MemoryError(
        f"max_batch={max_batch} needs {_readable(wanted(max_batch))} of buffers on {device}, "
        f"where {_readable(free)} are free; {advice}"
    )


@contextmanager
def explained(tick: Tick, max_batch: int) -> Iterator[None]:
    """Turn what an allocator says in the middle of a tick into a MemoryError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        smaller = len(tick.slots) // 2
        advice = f"; max_batch={smaller} asks for about half" if smaller else ""
        raise MemoryError(
            f"no memory for a network call of {len(tick.slots)} sequences (max_batch={max_batch}): {error}{advice}"
        ) from error


def _of_machine() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def _of_group() -> int | None:
    """What the control group of a container leaves, without what it holds as file cache."""
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(cached["inactive_file"]))
    except (OSError, KeyError, ValueError):  # "max" is no number: no limit
        return None


def _readable(size: int) -> str:
    return f"{size:,} bytes ({size / 2**30:.2f} GiB)"
