"""What the tests of the operators share."""

import json
import math
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from unmask.kernels import Offsets, dispatch, extension

usable, reason = extension.status()
triton_usable, triton_reason = dispatch.triton_status()
ISAS = extension._cpu.isas() if usable else []
compiled = pytest.mark.skipif(not usable, reason=reason)
with_triton = pytest.mark.skipif(not triton_usable, reason=triton_reason)
each_implementation = pytest.mark.parametrize(
    "impl", ["reference", pytest.param("cpu", marks=compiled), pytest.param("triton", marks=with_triton)]
)
each_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("", marks=compiled)])
numpy_remarks = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # Triton's interpreter on inf, NaN

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Rows of 256 in another order or company. The interpreter's product is NumPy's, in which the bits of a row may depend
# on its place in the tile, so there only whole tiles change places.
_SHUFFLED = torch.randperm(256, generator=torch.Generator().manual_seed(0))
ROW_ORDERS = [torch.arange(256).roll(128) if dispatch.interpreted() else _SHUFFLED, torch.arange(1), torch.arange(5)]
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def normal(*shape, seed=0, scale=1.0, dtype=F32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def offsets(counts, longest=None):
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    return Offsets(starts, max(counts) if longest is None else longest)


def on(impl, value):
    """Tensors, also those in pairs and dictionaries, where the implementation reads them."""
    if isinstance(value, torch.Tensor):
        return value.cuda() if impl == "triton" and not dispatch.interpreted() else value
    if isinstance(value, Offsets):
        return value._replace(starts=on(impl, value.starts))
    if isinstance(value, dict):
        return {name: on(impl, one) for name, one in value.items()}
    return tuple(on(impl, one) for one in value) if isinstance(value, tuple) else value


def exact_logits(hidden, weight, bias=None, temperature=1.0, forbid=(), rows=None):
    """The logits in fp64."""
    hidden = hidden.double() if rows is None else hidden[rows].double()
    logits = hidden if weight is None else hidden @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    divisor = temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature
    return logits.index_fill(1, torch.as_tensor(forbid, dtype=torch.int64), -math.inf) / divisor


def peak_memory(run):
    """Bytes by which the process grows at most while `run` runs, and then after."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    except OSError as error:
        pytest.skip(f"the peak of this process cannot be reset: {error}")

    def read(name):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    before = read("VmRSS")
    run()
    return read("VmHWM") - before


class Recorder:
    """Takes the place of a Triton kernel and keeps the tensors it is launched with."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __getitem__(self, grid):
        return lambda *arguments, **_: self.tensors.extend(a for a in arguments if isinstance(a, torch.Tensor))


def workspace(monkeypatch, module, run, inputs):
    """Bytes of memory that a Triton launcher passes to its kernels beside `inputs` and what it returns."""
    tensors = []
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Recorder(tensors))
    results = run()
    known = {tensor.untyped_storage()._cdata for tensor in (*inputs, *results)}
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for storage, size in sizes.items() if storage not in known)


def compiled_launches(operator):
    """What compile_launches.py says of an operator: without spills, tf32 and fp64, in shared memory that there is."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_launches.py"
    done = subprocess.run([sys.executable, script, operator], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["target"] for line in lines} == set(SHARED_MEMORY)
    for line in lines:
        assert line["shared"] <= SHARED_MEMORY[line["target"]], line
        if line["target"] == "sm_90":
            assert line["stack"] == line["tf32"] == 0 and not {"LDL", "STL", "DFMA", "DADD", "DMUL"} & set(
                line["instructions"]
            ), line
    return lines


def check_compiled_launches(operator):
    """By kernel, the first launch with bf16 on sm_90."""
    lines = compiled_launches(operator)
    return {line["kernel"]: line for line in reversed(lines) if line["target"] == "sm_90" and line["dtype"] == "bf16"}
