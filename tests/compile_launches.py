"""Compiles what the Triton launchers of an operator launch, for several GPUs and without any.

Run in a process of its own, without TRITON_INTERPRET. The launchers get tensors without memory, and every launch is
recorded and compiled instead of run: the same types, specialisations and options as on a GPU. Prints one JSON object
per kernel, dtype and target: bytes of shared memory, and for sm_90 registers, bytes of stack (spills) and instructions.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from unmask.kernels import Offsets
from unmask.kernels.add_norm import triton_kernel as add_norm
from unmask.kernels.add_norm.call import AddNormCall
from unmask.kernels.attention import triton_config
from unmask.kernels.attention import triton_kernel as attention
from unmask.kernels.attention.call import AttentionCall
from unmask.kernels.divergence import triton_kernel as divergence
from unmask.kernels.divergence.call import DivergenceCall
from unmask.kernels.expected_embedding import triton_kernel as expected_embedding
from unmask.kernels.expected_embedding.call import EmbeddingCall
from unmask.kernels.logits import Logits
from unmask.kernels.swiglu import triton_kernel as swiglu
from unmask.kernels.swiglu.call import SwigluCall

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES |= {torch.int64: "i64", torch.int32: "i32"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_launch(kernel, target, options, arguments):
    """The kernel as the just-in-time compiler specialises it for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        value, general = arguments[parameter.name], parameter.do_not_specialize
        is_tensor = isinstance(value, torch.Tensor)
        one = isinstance(value, int) and value == 1 and not general
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[at,] = value
            continue
        if isinstance(value, float):
            signature[parameter.name] = "fp32"
            continue
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32"
        if is_tensor or (value % 16 == 0 and not general):
            attributes[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def resources(cubin):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True).stdout
    names = set(re.findall(r"\b(HGMMA|HMMA|DFMA|DADD|DMUL|LDL|STL)\b", code))
    numbers = {key.lower(): int(re.search(rf"{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK")}
    return {**numbers, "instructions": sorted(names)}


def launches(dtype, run, target):
    """(kernel, options, arguments) of every launch of run(hidden, weight, offset, other hidden, weight, table)."""
    recorded = []
    triton_config.architecture = lambda device: target

    def record(kernel, *positional, grid, warmup, **named):
        arguments = dict(zip(kernel.arg_names, positional, strict=False)) | named
        options = {name: arguments.pop(name) for name in set(named) - set(kernel.arg_names)}
        recorded.append((kernel, options, arguments))

    before, JITFunction.run = JITFunction.run, record
    shapes = [(64, 768), (50258, 768), (64, 384), (50258, 384), (50258, 768)]
    try:
        run(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes))
    finally:
        JITFunction.run = before
    return recorded


def embed(hidden, weight, _hidden, _weight, table):
    offset, rows = hidden.new_empty(len(weight), dtype=torch.float32), hidden.new_empty(64, dtype=torch.int64)
    expected_embedding.expected_embedding(EmbeddingCall(Logits(hidden, weight, offset, rows=rows), table))


def diverge(hidden, weight, other_hidden, other_weight, _table):
    offset = hidden.new_empty(len(weight), dtype=torch.float32)
    divergence.divergence(DivergenceCall(Logits(hidden, weight, offset), Logits(other_hidden, other_weight, offset)))


def diverge_logits(hidden, weight, other_hidden, other_weight, _table):
    logits = hidden.new_empty(64, len(weight))
    divergence.divergence(DivergenceCall(Logits(logits, None, None), Logits(logits, None, None)))


def modulate(hidden, _weight, _other_hidden, _other_weight, _table):
    """Everything, a row of 768 columns and of 8192; and what a Llama block asks for."""
    for dim in (768, 8192):
        residual, delta = hidden.new_empty(64, dim, dtype=torch.float32), hidden.new_empty(64, dim)
        weight, vectors = residual.new_empty(dim), residual.new_empty(3, 4, dim).unbind(0)
        rows = Offsets(hidden.new_empty(5, dtype=torch.int32), 64)
        add_norm.add_norm(AddNormCall(residual, delta, weight, weight, *vectors, rows, 1e-5, delta))
    add_norm.add_norm(AddNormCall(residual, delta, weight, None, None, None, None, None, 1e-5, delta, rms=True))


def normalise(hidden, _weight, _other_hidden, _other_weight, _table):
    """Nothing that can be left out."""
    residual = hidden.new_empty(64, 768, dtype=torch.float32)
    weight = residual.new_empty(768)
    add_norm.add_norm(AddNormCall(residual, None, weight, None, None, None, None, None, 1e-5, hidden))


def attend(hidden, *_, most=1024, block=None):
    """Heads as in MDLM and in LLaDA, each with positions, offsets and views into packed keys and values."""

    def floats(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    for heads, groups, dim in ((12, 12, 64), (32, 32, 128)):
        rows = 4 * most
        query, packed = hidden.new_empty(rows, heads, dim), hidden.new_empty(4096, 2 * groups, dim)
        tokens, queries = (Offsets(hidden.new_empty(5, dtype=torch.int32), longest) for longest in (1024, most))
        positions, rope = hidden.new_empty(rows, dtype=torch.int64), (floats(1024, dim // 2), floats(1024, dim // 2))
        key, value = packed.chunk(2, dim=1)
        attention.attention(AttentionCall(query, key, value, tokens, queries, positions, rope, 0.1, query, block))


def attend_blocks(hidden, *_):
    attend(hidden, block=32)


def attend_few(hidden, *_):
    attend(hidden, most=16)
    attend(hidden, most=16, block=1)


def attend_some(hidden, *_):
    """The tile between few and many; without rotation a padded row; and fp16 whatever the dtype."""
    attend(hidden, most=64)
    half = hidden.new_empty(64, 2, 96, dtype=torch.float16)
    attention.attention(AttentionCall(half, half, half, (32, 32), (32, 32), None, None, 0.1, half))


def activate(hidden, *_):
    """Rows of an MLP as wide as LLaDA's, and short ones."""
    for dim in (12288, 640):
        swiglu.swiglu(SwigluCall(hidden.new_empty(64, 2 * dim), hidden.new_empty(64, dim)))


RUNS = {
    "attention": (attend, attend_few, attend_some, attend_blocks),
    "expected_embedding": (embed,),
    "divergence": (diverge, diverge_logits),
    "add_norm": (modulate, normalise),
    "swiglu": (activate,),
}


def main():
    """Every target for bf16; sm_90 for fp32, and for logits that are given."""
    runs = RUNS[sys.argv[1]]
    seen = set()
    for run in runs:
        for dtype in (torch.bfloat16, torch.float32):
            for name in TARGETS if dtype == torch.bfloat16 and run is runs[0] else ("sm_90",):
                for kernel, options, arguments in launches(dtype, run, name):
                    line = {"kernel": kernel.fn.__name__, "run": run.__name__, "dtype": TYPES[dtype], "target": name}
                    compiled = compile_launch(kernel, TARGETS[name], options, arguments)
                    if compiled.hash in seen:
                        continue
                    seen.add(compiled.hash)
                    line["shared"] = compiled.metadata.shared
                    if name == "sm_90":
                        line |= resources(compiled.asm["cubin"]) | {"tf32": compiled.asm["ptx"].lower().count("tf32")}
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
