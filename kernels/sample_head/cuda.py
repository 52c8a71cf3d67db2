"""sample_head by the compiled CUDA extension: bf16 and fp16, up to 256 rows, one pass over the weights."""

import functools

import torch
from torch import Tensor

from unmask.kernels.sample_head.call import HeadCall, HeadSample

try:
    import unmask.kernels._cuda as _cuda
except ImportError as error:
    _cuda, _missing = None, error

_DTYPES = torch.bfloat16, torch.float16
_FLOATS = "logprob", "max_prob", "margin", "entropy"
_states: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream: kernels that could meet share none


def status() -> tuple[bool, str]:
    if _cuda is None:
        how = "UNMASK_CUDA=1 pip install . (or -e .) builds it and needs nvcc"
        return False, f"the compiled extension unmask.kernels._cuda is missing ({_missing}); {how}"
    best = max(_capabilities(), default=None)
    if best is None:
        return False, "compiled extension; torch sees no CUDA device"
    if best < (8, 0):
        return False, f"compiled extension; needs compute capability 8.0, found {_dotted(best)}"
    return True, f"compiled extension, compute capability {_dotted(best)}"


def refuses(call: HeadCall) -> str | None:
    device = call.hidden.device
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device}"
    capability = _capabilities()[device.index]
    if capability < (8, 0):
        return f"needs compute capability 8.0, {device} has {_dotted(capability)}"
    return unserved(call, _max_rows(device.index))


def unserved(call: HeadCall, max_rows: int) -> str | None:
    """What the kernel lacks for a call, whatever the device; None if it serves it."""
    if call.weight is None:
        return "needs weight, got None"
    for name, tensor in (("hidden", call.hidden), ("weight", call.weight)):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype not in _DTYPES:
            return f"needs {name} in bfloat16 or float16, got {dtype}"
        if tensor.dtype != call.weight.dtype:
            return f"needs hidden and weight of one dtype, got {dtype} and {str(call.weight.dtype)[6:]}"
        row, column = tensor.stride()
        if tensor.data_ptr() % 16 or (len(tensor) > 1 and row % 8) or (tensor.shape[1] > 1 and column != 1):
            return f"needs {name} with every row contiguous and on 16 bytes, got strides {(row, column)}"
    if call.offset is not None and call.offset.dtype == torch.float64:
        return "needs bias narrower than float64"
    if call.top_k is not None or call.top_p is not None:
        return "serves no top_k and no top_p"
    if call.num_rows > max_rows:
        return f"serves up to {max_rows} rows, got {call.num_rows}"
    if call.vocab_size > _cuda.MAX_VOCAB:
        return f"serves up to {_cuda.MAX_VOCAB} ids, got {call.vocab_size}"
    return None


def sample_head(call: HeadCall) -> HeadSample:
    device = call.hidden.device
    stream = torch.cuda.current_stream(device).cuda_stream
    return launch(call, _state(device, stream), device.index, stream)


def launch(call: HeadCall, state: Tensor, device: int = 0, stream: int = 0, ctas: int = 0) -> HeadSample:
    """One kernel on a stream, as many CTAs as multiprocessors unless `ctas` says otherwise. `state` is as _state's."""
    num_rows, vocab_size = call.num_rows, call.vocab_size
    offset = None if call.offset is None else call.offset.float().contiguous()
    keys = call.keys.contiguous()
    tokens = call.keys.new_empty(num_rows)
    floats = {name: call.hidden.new_empty(num_rows, dtype=torch.float32) for name in _FLOATS if name in call.want}
    lse = call.hidden.new_empty(num_rows, dtype=torch.float32)
    argmax = tokens.new_empty(num_rows) if "argmax" in call.want else None
    each = isinstance(call.temperature, Tensor)
    temperatures = call.temperature.contiguous() if each else None
    gather = None if call.rows is None else call.rows.contiguous()
    allow = None if call.allow is None else call.allow.contiguous()
    out, positions = (None, None) if call.out is None else (call.out[0], call.out[1].contiguous())
    extras = tuple(map(_address, (floats.get("logprob"), floats.get("max_prob"), argmax, floats.get("margin"))))
    extras += (_address(floats.get("entropy")),)
    size = _cuda.workspace_bytes(rows=num_rows, vocab=vocab_size, extras=extras)
    workspace = call.hidden.new_empty(size, dtype=torch.uint8)
    _cuda.sample_head(
        type=str(call.hidden.dtype).removeprefix("torch."),
        hidden=_rows(call.hidden),
        weight=_rows(call.weight),
        rows=num_rows,
        vocab=vocab_size,
        dim=call.hidden.shape[1],
        gather=_address(gather),
        offset=_address(offset),
        allow=(_address(allow), 0 if allow is None else allow.shape[1]),
        keys=_address(keys),
        seed=call.seed,
        temperature=1.0 if each else call.temperature,
        temperatures=_address(temperatures),
        tokens=_address(tokens),
        lse=_address(lse),
        extras=extras,
        out=_address(out),
        positions=_address(positions),
        workspace=_address(workspace),
        size=size,
        state=_address(state),
        device=device,
        stream=stream,
        ctas=ctas,
    )
    return HeadSample(tokens, lse=lse, argmax=argmax, **floats)


def _state(device: torch.device, stream: int) -> Tensor:
    """Zeros, as every kernel leaves them. A graph gets its own: it may be replayed beside anything."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(_cuda.STATE_BYTES, dtype=torch.uint8, device=device)
    key = device, stream
    if key not in _states:
        _states[key] = torch.zeros(_cuda.STATE_BYTES, dtype=torch.uint8, device=device)
    return _states[key]


@functools.cache
def _capabilities() -> tuple[tuple[int, int], ...]:
    """Of every CUDA device that torch sees."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    return tuple(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))


@functools.cache
def _max_rows(device: int) -> int:
    return _cuda.max_rows(device)


def _rows(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.stride(0) if len(tensor) > 1 else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
