"""Compile the Triton kernels in their shipped configurations and print what came out, one JSON object a line.

Run as a script, without TRITON_INTERPRET, with two numbers: which part of how many of the cases to take.
No GPU is needed: Triton brings ptxas, cuobjdump and nvdisasm along.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unmask.kernels.sample_head import triton_kernel
from unmask.kernels.sample_head.triton_config import TABLES, TRUNCATE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "int64": ("keys", "rows", "buffer", "positions", "tokens", "argmax"),
    "int32": ("allow", "record_block", "top_id", "arrivals"),
}
INTEGERS = "num_rows", "vocab_size", "key0", "key1", "splits", "group", "stride", "top_k", "hidden_row", "weight_row"
ALIGNED = "hidden_row", "weight_row", "stride", "offset_stride"
# What a call leaves out. A lean call has an offset, rows, logprob and a buffer to write to.
RANKING = "max_prob", "argmax", "margin", "top_logit", "top_id", "second_logit"
LEAN = "temperatures", "allow", "entropy", "block_entropy", *RANKING
BARE = "offset", "rows", "buffer", "positions", "logprob", *LEAN


def source(kernel, dtype, absent=(), weight=None, **constants):
    """The kernel as it is specialised for aligned tensors of this dtype, weights perhaps of another, without those in
    `absent`."""
    short = {"int64": "i64", "int32": "i32", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    types = {name: f"*{short[kind]}" for kind, names in POINTERS.items() for name in names}
    types |= {"hidden": f"*{short[dtype]}", "weight": f"*{short[weight or dtype]}"} | dict.fromkeys(INTEGERS, "i32")
    types |= {"temperature": "fp32", "top_p": "fp32"}
    constants |= dict.fromkeys(name for name in absent if name != "offset")
    if kernel is not triton_kernel.truncate_kernel:
        constants |= {"hidden_column": 1, "weight_column": 1}
        if "offset" in absent:
            types["offset_stride"] = "i32"  # zero, a multiple of 16
        else:
            constants["offset_stride"] = 1
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or (name in ALIGNED and name not in constants)]
    return ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def race(config, dtype, dim, absent, weight=None):
    tile = {"dim": dim, "block_r": config.block_r, "block_v": config.block_v, "block_k": config.block_k}
    finish = {"finish_r": config.finish_r, "finish_splits": config.finish_splits}
    return source(triton_kernel.race_kernel, dtype, absent, weight, **tile, **finish), config.options


def logits(config, dtype, dim, absent=()):
    tile = {"dim": dim, "block_r": config.block_r, "block_v": config.block_v, "block_k": config.block_k}
    return source(triton_kernel.logits_kernel, dtype, absent, **tile), config.options


def cases(target):
    """(name, source, options): every kernel for every target; for sm_90 every configuration, with least and most."""
    table = TABLES.get(target, TABLES["other"])
    block_v, options = TRUNCATE["block_v"], {name: TRUNCATE[name] for name in ("num_warps", "enable_fp_fusion")}
    yield "truncate", source(triton_kernel.truncate_kernel, "float32", block_v=block_v), options
    yield "few bfloat16, lean", *race(table.few, "bfloat16", 4096, LEAN)
    yield "lean bfloat16", *race(table.lean, "bfloat16", 768, LEAN)
    yield "single float32, lean", *race(table.single, "float32", 4096, LEAN)
    yield "given float32", *race(table.logits, "float32", 1, ("weight",))
    yield "logits many bfloat16", *logits(table.many, "bfloat16", 768)
    if target == "sm_90":
        yield "few bfloat16", *race(table.few, "bfloat16", 4096, ())
        yield "few float16, bare", *race(table.few, "float16", 768, BARE)
        yield "many bfloat16", *race(table.many, "bfloat16", 768, ())
        yield "lean bfloat16, bare", *race(table.lean, "bfloat16", 3584, BARE)
        yield "lean float16, ragged", *race(table.lean, "float16", 1000, LEAN)
        yield "single float32", *race(table.single, "float32", 768, ())
        yield "single float32, narrow weights", *race(table.single, "float32", 4096, LEAN, "bfloat16")
        yield "given bfloat16", *race(table.logits, "bfloat16", 1, ("weight",))
        yield "logits lean float16", *logits(table.lean, "float16", 4096)
        yield "logits few bfloat16", *logits(table.few, "bfloat16", 3584)
        yield "logits single float32", *logits(table.single, "float32", 768)


def measured(kernel):
    """Registers, stack, spills, shared memory and the opcodes of a compiled kernel."""
    result = {"shared": kernel.metadata.shared}
    if "cubin" not in kernel.asm:
        counts = re.findall(r"\.(vgpr|sgpr)_(count|spill_count):\s*(\d+)", kernel.asm["amdgcn"])
        return result | {f"{kind}_{what}": int(number) for kind, what, number in counts}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(TOOLS / "nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE)
    counts = {opcode: opcodes.count(opcode) for opcode in sorted(set(opcodes))}
    spills = counts.get("LDL", 0) + counts.get("STL", 0)
    tf32 = len(re.findall(r"tf32", kernel.asm["ptx"], re.IGNORECASE))
    return result | {
        "registers": int(registers), "stack": int(stack), "spills": spills, "tf32": tf32, "opcodes": counts,
    }  # fmt: skip


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(part, parts):
    every = [(target, *case) for target in TARGETS for case in cases(target)]
    for target, name, code, options in every[part::parts]:
        kernel = triton.compile(code, target=TARGETS[target], options=options)
        print(json.dumps({"target": target, "case": name, **options, **measured(kernel)}), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "TRITON_INTERPRET must not be set"
    main(int(sys.argv[1]), int(sys.argv[2]))
