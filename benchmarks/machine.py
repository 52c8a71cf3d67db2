"""Where and with what a result was measured."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import ROOT
from unmask.measure import cpu_model


def describe(device: torch.device) -> dict:
    """JSON-ready: machine, versions, commit and date."""
    return {
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "flashinfer": _version("flashinfer-python"),
            "unmask": _version("unmask"),
        },
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command(module: str, arguments: Sequence[str] | None) -> list[str]:
    """How a benchmark was called, without saying where its files lie: of a path that leaves the folder, the name."""

    def shown(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        path = Path(value)
        return option + equals + (path.name if path.is_absolute() or ".." in path.parts else value)

    return ["python", "-m", module, *map(shown, sys.argv[1:] if arguments is None else arguments)]


def commit() -> str | None:
    """The checkout's commit, with a + if files differ from it; in a copy without git, what GIT_COMMIT says."""
    found = _output("git", "rev-parse", "HEAD")
    if found is None:
        return os.environ.get("GIT_COMMIT")
    return found + ("+" if _output("git", "status", "--porcelain") else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
