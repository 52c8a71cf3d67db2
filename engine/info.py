"""What `unmask info` tells: versions, this machine, operators and bundled models."""

import platform
from dataclasses import asdict
from importlib.metadata import version

import torch

from unmask.checkpoints import bundled, load
from unmask.kernels.dispatch import explain


def collect() -> dict:
    """One JSON-ready object: machine, operators with every implementation, bundled models."""
    return {
        "machine": machine(),
        "operators": [line._asdict() for line in explain()],
        "models": [{"name": name, **asdict(load(name).spec)} for name in bundled()],
    }


def machine() -> dict[str, str | int]:
    """Versions, and what runs here."""
    return {
        "unmask": version("unmask"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
