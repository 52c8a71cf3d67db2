"""What `unmask info` tells: versions, this machine, operators and bundled models; and where a result was measured."""

import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from unmask.checkpoints import load
from unmask.kernels.dispatch import explain
from unmask.measure import cpu_model
from unmask.places import bundled


def collect() -> dict:
    """One JSON-ready object: machine, operators with every implementation, bundled models."""
    return {
        "machine": {
            "unmask": version("unmask"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        "operators": [line._asdict() for line in explain()],
        "models": [{"name": name, **asdict(load(name).spec)} for name in bundled()],
    }


def environment(device: torch.device) -> dict:
    """JSON-ready, for the head of a result: machine, versions, commit (what GIT_COMMIT says) and date."""
    return {
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "unmask": version("unmask"),
        },
        "commit": os.environ.get("GIT_COMMIT"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
