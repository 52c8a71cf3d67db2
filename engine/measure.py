"""The calibration of this machine: every kind of operation of a network call, timed at a few sizes."""

import math
import platform
import statistics
from collections.abc import Callable
from functools import singledispatch
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from unmask.calibration import Calibration, DamagedCache, cache_file, read, write
from unmask.denoiser import Batch, Denoiser, DenoiserSpec, Head
from unmask.dtype import short
from unmask.kernels import add_norm, attention, sample_head, swiglu
from unmask.kernels.dispatch import explain
from unmask.models.linear import Linear
from unmask.models.rope import rope_tables
from unmask.reveal import Ancestral
from unmask.sampler import Sampler
from unmask.timing import in_turns
from unmask.work import AddNorm, Attention, Draw, Flops, Operation, Product, SwiGLU
from unmask.workspace import Workspace

SECONDS = 5.0  # that a calibration may take, about
IDLE_BYTES = 8 << 20  # read between the ticks of a run that computes nothing
BUSY = 1.3  # how much slower than the quickest runs a typical one is on a machine with other work

LAYERS = ((128, 384), (128, 512), (512, 128), (256, 768), (768, 768), (768, 2304), (768, 3072), (3072, 768))
PRODUCTS = [Product(rows, *sizes, gelu=sizes[1] == 4 * sizes[0]) for sizes in LAYERS for rows in (16, 64, 512, 4096)]
# (sequences, tokens, queries of each, heads, head dimension)
ATTENDED = (
    (1, 64, 64, 2, 64),
    (8, 64, 64, 8, 64),
    (4, 256, 256, 2, 64),
    (16, 256, 256, 2, 64),
    (4, 256, 256, 4, 32),
    (2, 256, 256, 4, 128),
    (1, 1024, 1024, 12, 64),
    (1, 64, 1, 2, 64),
    (16, 256, 2, 2, 64),
    (16, 256, 8, 2, 64),
    (2, 1024, 4, 12, 64),
)
ATTENTIONS = [Attention(n, n * rows, n * keys, n * rows * keys, *heads) for n, keys, rows, *heads in ATTENDED]
NORMS = [AddNorm(rows, width) for width in (128, 768) for rows in (16, 256, 2048)]
GATES = [SwiGLU(rows, width) for width in (512, 1536) for rows in (16, 256, 2048)]
DRAWS = [Draw(rows, *sizes) for sizes in ((128, 2048), (256, 8192), (768, 16384)) for rows in (1, 8, 32, 128)]


def calibrate(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    again: bool = False,
    tell: Callable[[str], object] = lambda message: None,
) -> Calibration:
    """This machine's calibration: the one in the user's cache folder, or measured now, in a few seconds, and kept.

    again: measure in any case. tell: is given a sentence when something is measured or a damaged file is replaced. A
    cache folder that cannot be written is no error.
    """
    device, path = torch.device(device), cache_file()
    if device.type != "cpu":
        raise ValueError(f"device must be cpu, got {device}: operations timed one by one do not tell a GPU's graphs")
    machine = describe(device, dtype)
    try:
        found = None if again or path is None else read(path, machine)
    except DamagedCache as error:
        tell(f"{error}; it is replaced")
        found = None
    if found is not None:
        return found
    tell(f"measuring how fast this machine is in {machine['dtype']}, once: about {SECONDS:.0f} seconds")
    found = measure(device, dtype, tell)
    try:
        if path is not None:
            write(path, found)
    except OSError as error:
        tell(f"the measurement could not be kept in {path}: {error.strerror}")
    return found


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What a calibration holds for."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": str(torch.get_num_threads()),
        "unmask": version("unmask"),
        "torch": torch.__version__,
        "dtype": short(dtype),
        "operators": " ".join(f"{line.operator}={line.implementation}" for line in explain() if line.picked),
    }


def measure(
    device: torch.device, dtype: torch.dtype, tell: Callable[[str], object] = lambda message: None
) -> Calibration:
    """Times every kind of operation through the functions that a run calls, at sizes from a few rows to thousands."""
    operations = [*PRODUCTS, *ATTENTIONS, *NORMS, *GATES, *DRAWS]
    runs = {operation: prepare(operation, device, dtype) for operation in operations}
    taken = in_turns(runs, seconds=SECONDS / 2, device=device, min_rounds=3)
    # The quickest quarter: whatever else runs on the machine only makes an operation slower.
    quick = {operation: seconds[len(seconds) // 4] for operation, seconds in taken.items()}
    if statistics.median(statistics.median(taken[each]) / quick[each] for each in quick) > BUSY:
        tell("other programs kept this machine busy meanwhile: predictions may be far off until it is measured anew")
    return Calibration.fit(describe(device, dtype), quick.items(), _tick_seconds(device))


@singledispatch
def prepare(operation: Operation, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A call that does `operation`, on random numbers."""
    raise TypeError(f"operation must be one of unmask.work, got {type(operation).__name__}")


@prepare.register
def _(product: Product, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    x, weight = (torch.randn(n, product.inner, device=device).to(dtype) for n in (product.rows, product.outer))
    linear, out = Linear(weight), torch.empty(product.rows, product.outer, dtype=dtype, device=device)
    return lambda: linear.gelu(x, out) if product.gelu else linear(x, out)


@prepare.register
def _(attended: Attention, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    heads, length = (attended.heads, attended.head_dim), attended.keys // attended.sequences
    query = torch.randn(attended.queries, *heads, device=device).to(dtype)
    shared = attended.kv_heads or attended.heads, attended.head_dim
    key, value = torch.randn(attended.keys, 2, *shared, device=device).to(dtype).unbind(1)
    rows = attended.queries // attended.sequences
    options = {
        "lengths": (length,) * attended.sequences,
        "row_counts": (rows,) * attended.sequences,
        "positions": torch.arange(rows, device=device).repeat(attended.sequences) if rows < length else None,
        "rope": tuple(table.to(device) for table in rope_tables(attended.head_dim, length)),
        "out": torch.empty_like(query),
    }
    return lambda: attention(query, key, value, **options)


@prepare.register
def _(norm: AddNorm, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    residual, weight = torch.randn(norm.rows, norm.width, device=device), torch.ones(norm.width, device=device)
    delta = torch.zeros(norm.rows, norm.width, dtype=dtype, device=device)
    out = torch.empty_like(delta)
    return lambda: add_norm(residual, delta, weight, out=out)


@prepare.register
def _(gated: SwiGLU, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    gate_up = torch.randn(gated.rows, 2 * gated.width, device=device).to(dtype)
    out = torch.empty(gated.rows, gated.width, dtype=dtype, device=device)
    return lambda: swiglu(gate_up, out=out)


@prepare.register
def _(draw: Draw, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    hidden, weight = (torch.randn(n, draw.width, device=device).to(dtype) for n in (draw.rows, draw.vocab_size))
    weight /= math.sqrt(draw.width)
    bias = torch.zeros(draw.vocab_size, device=device)
    targets = torch.arange(draw.rows, device=device)
    keys = torch.stack([targets, targets, torch.zeros_like(targets)], 1)
    out, logprobs = (torch.empty_like(targets), targets), torch.empty(draw.rows, device=device)

    def run() -> None:
        drawn = sample_head(hidden, weight, bias, keys=keys, seed=0, out=out, want=("logprob",))
        logprobs[targets] = drawn.logprob.float()  # as a run does

    return run


class _Idle(Denoiser):
    """Computes nothing and reads as much memory as a small network does, so that a run finds its caches as cold."""

    def __init__(self, device: torch.device) -> None:
        self.name, self.tokenizer, self.device = "idle", None, device
        self.spec = DenoiserSpec("idle", 4, 0, 1, 0, 1, 0, max_length=256)
        self.head = Head(torch.zeros(4, 1, device=device))
        self.memory = torch.zeros(IDLE_BYTES // 4, device=device)

    def buffers(self, max_tokens: int, max_rows: int, max_batch: int) -> dict[str, tuple[int, torch.dtype]]:
        return {}

    def hidden(self, batch: Batch, workspace: Workspace) -> Tensor:
        self.memory.sum()
        return torch.zeros(len(batch.rows), 1, device=batch.rows.device)

    def flops(self, length: int, num_rows: int) -> Flops:
        return Flops(0, 0, 0)


def _tick_seconds(device: torch.device) -> float:
    """Seconds that a run spends on a tick outside the network and its head, in ticks of 16 sequences of 256 tokens."""
    sampler, found = Sampler(_Idle(device), reveal=Ancestral(16)), []
    for _ in range(3):
        stats = sampler.sample(32).stats
        found.append((stats.seconds["plan"] + stats.seconds["other"]) / stats.num_ticks)
    return min(found)


def cpu_model() -> str:
    """The processor's name as its maker gives it, or its kind where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
