"""How ticks reach a device: as they are, in a few padded shapes, or as CUDA graphs. The only file that knows streams.

A tick is a call `step(bucket, inputs)` that reads and writes tensors of the run and decides nothing on the host beyond
its bucket. On a CPU it runs in its exact shape. On a GPU its shape is rounded, and the first tick of each bucket is
also captured: later ones copy their record into the graph's inputs and replay it. All graphs share one memory pool,
which is safe in any order of replays since nothing that is in the pool outlives a tick: a swap of models is a different
graph, and no more. The host runs ahead and waits for the device only when the samples that it hands out are not there.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from unmask.denoiser import Denoiser
from unmask.tables import Bucket, TickInputs, exact, read, rounded
from unmask.timeline import Limits, Tick

Step = Callable[[Bucket, TickInputs], None]
WINDOW = 64  # ticks that are planned and uploaded together


class Fetched:
    """Copies of tensors on their way to the host."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._arrived = None
        if tensors[0].is_cuda:
            self.tensors = tuple(torch.empty_like(one, device="cpu", pin_memory=True) for one in tensors)
            for here, there in zip(self.tensors, tensors, strict=True):
                here.copy_(there, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))
        else:
            self.tensors = tensors

    @property
    def ready(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def wait(self) -> tuple[Tensor, ...]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self.tensors


def upload(device: torch.device, packed: np.ndarray) -> Tensor:
    """uint8 [n] on its way to the device; nobody waits for it."""
    on_host = torch.from_numpy(packed)
    return on_host if device.type == "cpu" else on_host.pin_memory().to(device, non_blocking=True)


def executor(denoiser: Denoiser, limits: Limits, graphs: bool | None) -> "Exact":
    """Who runs the ticks of a denoiser; graphs: True or False, or None for what is fastest.

    Without graphs a GPU makes the same calls in the same shapes, and gives the same bits.
    """
    if denoiser.device.type != "cuda":
        if graphs:
            raise ValueError(f"graphs must be None or False on {denoiser.device}, which has no CUDA graphs; got True")
        return Exact(denoiser.device)
    if not denoiser.capturable:
        if graphs:
            raise ValueError(f"graphs must be None or False for {denoiser.name!r}, which needs the host; got True")
        return Exact(denoiser.device)
    return (Padded if graphs is False else Graphs)(denoiser.device, limits)


class Exact:
    """Runs each tick in its own shape, which the host knows entirely: for CPUs, and for models that need to know it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.window = WINDOW if device.type == "cuda" else 1
        self._clock = _EventClock() if device.type == "cuda" else None

    def bucket(self, tick: Tick) -> Bucket:
        return exact(tick)

    def run(self, bucket: Bucket, record: Tensor, step: Step) -> None:
        """One tick, from its record on the device."""
        with self._timed():
            step(bucket, read(record, bucket))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self._clock is None:
            yield
        else:
            with torch.cuda.device(self.device), self._clock:
                yield

    @property
    def device_seconds(self) -> float:
        """Time of the ticks that are done, by the device's own clock; 0 where the host's tells it."""
        return 0.0 if self._clock is None else self._clock.seconds

    def close(self) -> None:
        """Let go of everything on the device."""


class Padded(Exact):
    """Runs ticks in rounded shapes, from inputs that stay where they are: what `Graphs` replays, call by call."""

    def __init__(self, device: torch.device, limits: Limits) -> None:
        super().__init__(device)
        self._limits = limits
        self._inputs: dict[Bucket, Tensor] = {}

    def bucket(self, tick: Tick) -> Bucket:
        return rounded(tick, self._limits)

    def run(self, bucket: Bucket, record: Tensor, step: Step) -> None:
        if bucket not in self._inputs:
            self._inputs[bucket] = torch.empty_like(record)
        inputs = self._inputs[bucket].copy_(record, non_blocking=True)
        self._execute(bucket, lambda: step(bucket, read(inputs, bucket)))

    def _execute(self, bucket: Bucket, call: Callable[[], None]) -> None:
        with self._timed():
            call()

    def close(self) -> None:
        self._inputs.clear()


class Graphs(Padded):
    """Captures the first tick of each bucket once it has run, and replays it for the others."""

    def __init__(self, device: torch.device, limits: Limits) -> None:
        super().__init__(device, limits)
        self._replays: dict[Bucket, Callable[[], None]] = {}
        self._pool = None

    def _execute(self, bucket: Bucket, call: Callable[[], None]) -> None:
        with self._timed():
            self._replays.get(bucket, call)()
        if bucket not in self._replays:  # the call also compiled kernels and made handles, which a capture could not
            self._replays[bucket] = self._capture(call)

    def _capture(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self._pool):
            call()
        self._pool = graph.pool()
        return graph.replay

    def close(self) -> None:
        super().close()
        self._replays.clear()
        self._pool = None


class _EventClock:
    """Seconds between pairs of events on the current stream; a pair is read once the device has passed it."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._done = 0.0

    def __enter__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()

    def __exit__(self, *error: object) -> None:
        self._end.record()
        self._pending.append((self._begin, self._end))
        self._read()

    @property
    def seconds(self) -> float:
        self._read()
        return self._done

    def _read(self) -> None:
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._done += begin.elapsed_time(end) / 1000
