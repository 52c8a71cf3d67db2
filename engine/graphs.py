"""How ticks reach a device: as they are, in a few padded shapes, or as CUDA graphs. The only file that knows streams.

A tick is a call `step(bucket, inputs)` that reads and writes tensors of the run and decides nothing on the host beyond
its bucket. On a CPU it runs in its exact shape. On a GPU its shape is rounded, and a bucket that is met again is
captured: from then on ticks copy their record into the graph's inputs and replay it. All graphs of a run share one
memory pool, which is safe in any order of replays since nothing that is in the pool outlives a tick: a swap of models
is a different graph, and no more. The host runs ahead. It waits for the device to capture, a few times in a run, and
for samples to hand out once all ticks are under way.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from unmask.denoiser import Denoiser
from unmask.spans import SILENT, Spans
from unmask.tables import Bucket, TickInputs, exact, rounded
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


def executors(
    denoisers: Iterable[Denoiser],
    limits: Limits,
    graphs: bool | None,
    impl: str | None = None,
    spans: Spans = SILENT,
) -> list["Exact"]:
    """Who runs the ticks of each denoiser. graphs: True or False, or None for what is fastest. impl: of the head.
    spans: who is told of ticks and captures.

    Without graphs a GPU makes the same calls in the same shapes, and gives the same bits. The specification of the head
    waits for the device in each tick, as a denoiser may that is not `capturable`: such ticks run as they are.
    """
    pool = None

    def one(denoiser: Denoiser) -> Exact:
        nonlocal pool
        obstacle = _obstacle(denoiser, impl)
        if obstacle and graphs:
            raise ValueError(f"graphs must be None or False for {denoiser.name!r} on {denoiser.device}, {obstacle}")
        if obstacle:
            return Exact(denoiser.device, spans=spans)
        if graphs is False:
            return Padded(denoiser.device, limits, spans=spans)
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        return Graphs(denoiser.device, limits, pool, spans=spans)

    return [one(denoiser) for denoiser in denoisers]


def _obstacle(denoiser: Denoiser, impl: str | None) -> str | None:
    """Why its ticks cannot be captured."""
    if denoiser.device.type != "cuda":
        return "which has no CUDA graphs"
    if not denoiser.capturable:
        return "whose network needs the host in each tick"
    return "whose head would be impl='reference'" if impl == "reference" else None


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device and process: torch keeps a workspace of cuBLAS for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Exact:
    """Runs each tick in its own shape, which the host knows entirely: for CPUs, and for models that need to know it."""

    padded = False

    def __init__(self, device: torch.device, *, spans: Spans = SILENT) -> None:
        self.device, self._spans = device, spans
        self.window = WINDOW if device.type == "cuda" else 1
        self._clock = _EventClock() if device.type == "cuda" else None

    def bucket(self, tick: Tick) -> Bucket:
        return exact(tick)

    def run(self, bucket: Bucket, record: Tensor, step: Step) -> None:
        """One tick, from its record on the device."""
        with self._timed(), self._spans("tick", bucket.model):
            step(bucket, bucket.read(record))

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

    padded = True

    def __init__(self, device: torch.device, limits: Limits, *, spans: Spans = SILENT) -> None:
        super().__init__(device, spans=spans)
        self._limits = limits
        self._inputs: dict[Bucket, Tensor] = {}

    def bucket(self, tick: Tick) -> Bucket:
        return rounded(tick, self._limits)

    def run(self, bucket: Bucket, record: Tensor, step: Step) -> None:
        if bucket not in self._inputs:
            self._inputs[bucket] = torch.empty_like(record)
        inputs = self._inputs[bucket].copy_(record, non_blocking=True)
        self._execute(bucket, lambda: step(bucket, bucket.read(inputs)))

    def _execute(self, bucket: Bucket, call: Callable[[], None]) -> None:
        with self._timed(), self._spans("tick", bucket.model):
            call()

    def close(self) -> None:
        self._inputs.clear()


class Graphs(Padded):
    """Captures a bucket's call after its second tick, and replays it from the third on. pool: of all graphs of a run.

    A capture waits for the device and costs more than a tick: buckets that are met but once are not worth it.
    """

    def __init__(
        self, device: torch.device, limits: Limits, pool: tuple[int, int] | None = None, *, spans: Spans = SILENT
    ) -> None:
        super().__init__(device, limits, spans=spans)
        self._replays: dict[Bucket, Callable[[], None]] = {}
        self._seen: set[Bucket] = set()
        self._pool = pool

    def _execute(self, bucket: Bucket, call: Callable[[], None]) -> None:
        with self._timed(), self._spans("tick", bucket.model):
            self._replays.get(bucket, call)()
        if bucket in self._seen and bucket not in self._replays:
            # The calls so far compiled kernels and made the libraries' handles, which a capture could not.
            with self._spans("capture", bucket.model):
                self._replays[bucket] = self._capture(call)
        self._seen.add(bucket)

    def _capture(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        options = {"pool": self._pool, "stream": _capture_stream(self.device), "capture_error_mode": "thread_local"}
        with torch.cuda.device(self.device), torch.cuda.graph(graph, **options):
            call()
        return graph.replay

    def close(self) -> None:
        super().close()
        self._replays.clear()
        self._seen.clear()


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
