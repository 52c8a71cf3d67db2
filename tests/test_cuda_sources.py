"""What the CUDA sources compile to: no spill, tensor cores, nothing in fp64. Needs nvcc, no GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = "80", "90a"
KERNELS = 10  # two dtypes in five shapes


def tool(name):
    """A tool of the toolkit, on the PATH or in Triton's package."""
    found = importlib.util.find_spec("triton")
    inside = [str(Path(found.origin).parent / "backends/nvidia/bin")] if found else []
    path = shutil.which(name) or shutil.which(name, path=":".join(inside))
    if path is None:
        pytest.skip(f"{name} is neither on the PATH nor in Triton's package")
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """For each target, the cubin and what ptxas says of it."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is missing: the sources cannot be compiled for a GPU")
    folder, running = tmp_path_factory.mktemp("cubin"), {}
    for target in TARGETS:
        cubin = folder / f"{target}.cubin"
        flags = ["-std=c++17", "-O3", "-Xptxas=-v", "-cubin", f"-gencode=arch=compute_{target},code=sm_{target}"]
        command = [shutil.which("nvcc"), *flags, ROOT / "csrc/cuda/sample_head.cu", "-o", cubin]
        running[target] = cubin, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    results = {}
    for target, (cubin, process) in running.items():
        _, report = process.communicate()
        assert process.returncode == 0, report
        results[target] = cubin, report
    return results


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(compiled, target):
    _, report = compiled[target]
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    print(f"\nsm_{target}: registers {registers}")
    assert len(memory) == len(registers) == KERNELS
    assert set(memory) == {("0", "0", "0")}


@pytest.mark.parametrize("target", TARGETS)
def test_instructions(compiled, target):
    code = subprocess.run([tool("nvdisasm"), "-c", compiled[target][0]], capture_output=True, text=True, check=True)
    kernels = re.split(r"^\s*\.section\s+\.text\.", code.stdout, flags=re.MULTILINE)[1:]
    assert len(kernels) == KERNELS
    for kernel in kernels:
        found = set(re.findall(r"^\s*/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]+)", kernel, flags=re.MULTILINE))
        names = {instruction.split(".")[0] for instruction in found}
        assert {"HMMA", "LDSM", "LDGSTS"} <= names, names
        assert any(i.startswith("HMMA.16816.F32") for i in found), found
        assert all(".128" in i for i in found if i.startswith("LDGSTS")), found
        assert not names & {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA"}, names
        assert not names & {"LDL", "STL"}, names
        assert not any(".F64" in i for i in found), found


def test_the_extension_imports_without_a_driver():
    if importlib.util.find_spec("unmask.kernels._cuda") is None:
        pytest.skip("the compiled CUDA kernels are not built")
    code = """
import unmask.kernels._cuda as c
assert c.MAX_ROWS == 256
print(c.workspace_bytes(rows=3, vocab=50258, extras=(0,) * 5))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    blocks, spans = 400, 16  # 393 and 13, in sixteens
    assert int(found.stdout) == 3 * (12 * blocks + 4 * spans)
