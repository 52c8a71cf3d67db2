"""Everything that needs a GPU, in one command of less than nine minutes: build, tests, benchmarks.

    make gpu-check        # or: python3 -m benchmarks.gpu_check; MDLM, BD3LMS, LLADA, DREAM: copies of other samplers

Takes the packages that are there and fetches none. A stage that fails does not stop the others: how each went stands in
summary.json, what it printed in gpu-check.log, the times in a folder for each shape, all in $OUT or ./gpu-check.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT

NEEDED = (
    *("torch", "numpy", "rich", "typer", "pyarrow", "safetensors", "tokenizers", "huggingface_hub"),
    *("setuptools", "pybind11", "pytest", "hypothesis", "scipy"),
)
INSTALL = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
BUILDS = {  # the most that can be built, in seconds
    "build": (180, {"UNMASK_CPU": "1", "UNMASK_CUDA": "1"}),
    "build without CUDA kernels": (120, {"UNMASK_CPU": "1", "UNMASK_CUDA": "0"}),
    "build without compiled kernels": (60, {"UNMASK_CPU": "0", "UNMASK_CUDA": "0"}),
}
SECONDS = 530.0  # for everything
TESTS = 180.0
STEPS = 70.0
PEERS = 80.0
GREEDY = 60.0
CHECKOUTS = "MDLM", "BD3LMS", "LLADA", "DREAM"  # environment variables that name copies of other samplers
SHAPES = {"mdlm-small": 1 / 3, "llada-8b": 1 / 2, "dream-7b": 1.0}  # share that each may take of the time left
ROWS = "1,8,64,256,1024,8192"
_TAIL = 20  # lines of a failed stage that the terminal shows


@dataclass(frozen=True)
class Stage:
    """`status`: passed, failed or timed out."""

    name: str
    status: str
    seconds: float
    command: str


class Check:
    """Runs stages one after the other and keeps their record."""

    def __init__(self, out: Path, seconds: float = SECONDS):
        self.out, self.end = out, time.monotonic() + seconds
        self.stages: list[Stage] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "gpu-check.log"
        self.log.write_text("")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def stage(self, name: str, command: list[str], limit: float, environment: dict[str, str] | None = None) -> bool:
        """Whether the command ended well within `limit` seconds and the time left."""
        environment = environment or {}
        shown = " ".join([*(f"{key}={value}" for key, value in environment.items()), *command])
        tell(f"{name}: {shown}")
        begin = time.monotonic()
        with self.log.open("a") as log:
            print(f"\n=== {name}: {shown}", file=log, flush=True)
            start = log.tell()
            status = run(command, os.environ | {"PYTHONUNBUFFERED": "1"} | environment, log, min(limit, self.left))
        self.stages.append(Stage(name, status, round(time.monotonic() - begin, 1), shown))
        if status != "passed":
            with self.log.open() as log:
                log.seek(start)
                tell("".join(log.readlines()[-_TAIL:]))
        tell(f"{name}: {status} after {self.stages[-1].seconds} s")
        self.save()
        return status == "passed"

    def save(self) -> None:
        record = {
            "ok": all(stage.status == "passed" for stage in self.stages),
            "stages": list(map(asdict, self.stages)),
        }
        (self.out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")


def run(command: list[str], environment: dict[str, str], log, limit: float) -> str:
    if limit < 1:
        return "timed out"
    # A session of its own, so that what it started ends with it.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return "passed" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def obstacle() -> str | None:
    """Why nothing can be checked on this machine."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if "torch" in missing:
        return f"gpu-check needs torch, and {sys.executable} has none"
    import torch

    if not torch.cuda.is_available():
        return f"gpu-check needs an NVIDIA GPU, and torch {torch.__version__} sees none on this machine"
    return f"gpu-check needs the packages {', '.join(missing)} beside torch" if missing else None


def tests() -> list[str]:
    """Files of the operators' tests, and pytest's options for the plugins that are there."""
    operators = [path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")]
    words = (*operators, "noise", "kernel", "triton", "cuda", "benchmark", "graphs", "tables", "dit", "profile")
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py"))]
    options = ["-q", "-W", "default", "-p", "no:cacheprovider"]  # other versions of packages may warn
    options += ["-n", "4"] if find_spec("xdist") else []
    options += ["--timeout", "120"] if find_spec("pytest_timeout") else []
    return [*options, *(file for file in files if any(word in file for word in words))]


def main() -> int:
    if why := obstacle():
        sys.exit(why)
    check = Check(Path(os.environ.get("OUT") or ROOT / "gpu-check"))
    if not any(check.stage(name, INSTALL, limit, environment) for name, (limit, environment) in BUILDS.items()):
        sys.exit("gpu-check: nothing could be installed")
    check.stage("info", [sys.executable, "-c", "import unmask.cli; unmask.cli.main()", "info"], 60)
    check.stage("tests", [sys.executable, "-m", "pytest", *tests()], TESTS)
    check.stage("benchmark step", step(check.out), STEPS)
    check.stage("benchmark peers", peers(check.out), PEERS)
    if os.environ.get("LLADA"):
        check.stage("benchmark greedy", greedy(check.out), GREEDY)
    for shape, share in SHAPES.items():
        limit = check.left * share - 5
        check.stage(f"benchmark {shape}", operators(check.out / shape, shape, limit - 20), limit)
    summary(check)
    return int(any(stage.status != "passed" for stage in check.stages))


def operators(out: Path, shape: str, budget: float) -> list[str]:
    """The microbenchmarks of every operator at one shape."""
    command = [sys.executable, "-m", "benchmarks", "run", "--device", "cuda", "--shape", shape, "--rows", ROWS]
    return [*command, "--seconds", "0.15", "--budget", f"{max(1.0, budget):.0f}", "--out", str(out)]


def step(out: Path) -> list[str]:
    """The step benchmark, beside the published sampler if MDLM names a checkout of it."""
    command = [sys.executable, "-m", "benchmarks.step", "--device", "cuda", "--seconds", "2", "--steps", "16"]
    command += ["--budget", f"{STEPS - 30:.0f}", "--out", str(out / "step.json")]
    checkout = os.environ.get("MDLM")
    return [*command, "--mdlm", str(Path(checkout).resolve())] if checkout else command


def peers(out: Path) -> list[str]:
    """Whole runs beside torch.compile, and beside the samplers whose copies are named."""
    command = [sys.executable, "-m", "benchmarks", "peers", "--device", "cuda", "--rounds", "3"]
    command += ["--budget", f"{PEERS - 50:.0f}", "--out", str(out / "peers.json")]
    paths = {name: os.environ.get(name) for name in CHECKOUTS}
    return command + [f"--{name.lower()}={Path(path).resolve()}" for name, path in paths.items() if path]


def greedy(out: Path) -> list[str]:
    """LLaDA's generate beside its drop-in, and caching."""
    command = [sys.executable, "-m", "benchmarks", "greedy", "--device", "cuda", "--rounds", "2", "--batch", "8"]
    return [*command, "--llada", str(Path(os.environ["LLADA"]).resolve()), "--out", str(out / "greedy.json")]


def summary(check: Check) -> None:
    """Short tables at the very end: of a step, then the fastest implementation of each operator at each size beside the
    floor and the fastest peer."""
    path = check.out / "step.json"
    tell("one step: B, side, by hand on an H200 ms, predicted here ms, measured ms")
    for row in json.loads(path.read_text())["rows"] if path.exists() else []:
        if row["case"] == "step":
            figures = (1e3 * (one or 0) for one in (row["roofline"], row["predicted"], row["timing"]["median"]))
            tell(f"  {row['batch']:>6}  {row['variant']:<10}" + "".join(f"{figure:>12,.2f}" for figure in figures))
    path = check.out / "peers.json"
    tell("whole runs: workload, sampler, seconds, × ours")
    for row in json.loads(path.read_text())["rows"] if path.exists() else []:
        ratio = f"{row['ratio']:>12,.2f}" if row["ratio"] else ""
        tell(f"  {row['workload']:<12}{row['peer']:<28}{row['seconds']['median']:>12,.2f}{ratio}")
    for shape in SHAPES:
        path = check.out / shape / "operators.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        tell(f"{shape}: case, fastest implementation, predicted floor µs, measured µs, fastest peer or reference µs")
        for case in dict.fromkeys((row["operator"], row["case"]) for row in rows):
            timed = [row for row in rows if (row["operator"], row["case"]) == case]
            ours = fastest([row for row in timed if row["role"] == "implementation"])
            other = fastest([row for row in timed if row["role"] == "peer" or row["implementation"] == "reference"])
            if ours:
                figures = (ours["floor"], seconds(ours), *([seconds(other)] if other else []))
                name = f"  {' '.join(case):<48}{ours['implementation']:<10}"
                tell(name + "".join(f"{1e6 * figure:>12,.1f}" for figure in figures))
    for stage in check.stages:
        tell(f"{stage.status:<10}{stage.name} ({stage.seconds} s)")


def fastest(rows: list[dict]) -> dict | None:
    return min(filter(seconds, rows), key=seconds, default=None)


def seconds(row: dict) -> float | None:
    timing = row["timings"]["graph"] or row["timings"]["cold"]
    return timing and timing["median"]


def tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
