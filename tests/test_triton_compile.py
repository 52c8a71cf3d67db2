"""What the Triton kernels compile to, for every architecture, on a machine without any of them."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = Path(__file__).parent / "compile_triton.py"
TARGETS = "sm_80", "sm_90", "sm_100", "gfx942"
PROCESSES = 2
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.fixture(scope="module")
def kernels():
    """What tests/compile_triton.py says of every case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(part):
        command = [sys.executable, SCRIPT, str(part), str(PROCESSES)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(PROCESSES) as pool:
        return [kernel for part in pool.map(run, range(PROCESSES)) for kernel in part]


def on(kernels, *targets):
    return [kernel for kernel in kernels if kernel["target"] in targets]


def test_every_kernel_compiles_for_every_target(kernels):
    ours = {"truncate", "lean", "single", "given", "logits", "few"}
    for target in TARGETS:
        assert ours <= {kernel["case"].split()[0] for kernel in on(kernels, target)}, target
    assert "many" in {kernel["case"].split()[0] for kernel in on(kernels, "sm_90")}


def test_tiles_fit_in_shared_memory(kernels):
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[kernel["target"]], kernel


def test_two_programs_for_few_rows_fit_on_a_multiprocessor_of_sm_90(kernels):
    for kernel in on(kernels, "sm_90"):
        if kernel["case"].startswith("few"):
            assert 2 * (kernel["shared"] + 1024) <= SHARED["sm_90"] and kernel["registers"] * 256 <= 65_536, kernel


def test_nothing_spills_on_sm_90(kernels):
    for kernel in on(kernels, "sm_90"):
        assert kernel["stack"] == kernel["spills"] == 0, kernel
        print(f"\n{kernel['case']}: {kernel['registers']} registers, {kernel['shared']} bytes of shared memory", end="")


def test_products_of_half_precision_run_on_tensor_cores(kernels):
    instructions = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    found = 0
    for kernel in on(kernels, *instructions):
        if "float16" in kernel["case"] and "given" not in kernel["case"]:
            found += 1
            assert instructions[kernel["target"]] in kernel["opcodes"], kernel
    assert found >= 12


def test_products_of_fp32_are_products_of_fp32(kernels):
    for kernel in on(kernels, "sm_80", "sm_90", "sm_100"):
        assert kernel["tf32"] == 0, kernel
        if "float32" in kernel["case"]:
            assert not any("MMA" in opcode for opcode in kernel["opcodes"]), kernel
            assert "given" in kernel["case"] or kernel["opcodes"]["FFMA"] > 200, kernel


def test_there_is_no_fp64_arithmetic(kernels):
    for kernel in on(kernels, "sm_80", "sm_90", "sm_100"):
        assert not {"DADD", "DMUL", "DFMA", "DMMA", "DSETP"} & set(kernel["opcodes"]), kernel
