"""Imports modules of a published checkout as they are, without the packages that only its training needs.

These packages are replaced by stand-ins that do nothing.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn

TRAINING = (
    *("causal_conv1d", "datasets", "hydra", "lightning", "mamba_ssm", "omegaconf", "requests", "timm"),
    *("torchmetrics", "transformers"),
)


class Checkout(NamedTuple):
    """What a peer needs: `source`, whose path is given with `--option`, with these files, and installed packages."""

    option: str
    source: str
    files: tuple[str, ...]
    packages: tuple[str, ...] = ()

    def incomplete(self, path: Path) -> str | None:
        """Why it is not what it should be, or None."""
        if not path.is_dir():
            return f"--{self.option} must be {self.source}, got {str(path)!r}, which is no folder"
        missing = [name for name in self.files if not (path / name).is_file()]
        if missing:
            return f"--{self.option} must be {self.source}, got {str(path)!r}, which lacks {missing[0]}"
        return None

    def lacks(self, path: Path | None) -> str | None:
        """Why the peer cannot run, or None."""
        if path is None:
            return f"needs {self.source}, given with --{self.option}"
        if why := self.incomplete(path):
            return why
        absent = [name for name in self.packages if not find_spec(name)]
        return f"{absent[0]} is not installed (pip install {absent[0]})" if absent else None


@contextmanager
def importable(
    folder: Path,
    modules: tuple[str, ...],
    *,
    given: Mapping[str, ModuleType] | None = None,
    stand_ins: tuple[str, ...] = TRAINING,
) -> Iterator[None]:
    """Lets the folder's `modules` be imported by their plain names, and forgets these names and the stand-ins again.

    given: modules to be found by their names in place of installed ones. stand_ins: packages to be replaced.
    """
    given = given or {}
    finder, place = _StandIns(stand_ins), str(folder)
    before = dict(sys.modules)
    passing = {*modules, *stand_ins, *(name.split(".")[0] for name in given)}

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in passing]:
            del sys.modules[name]

    forget()
    sys.path.insert(0, place)
    sys.meta_path.insert(0, finder)
    sys.modules.update(given)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(place)
        forget()
        sys.modules.update(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that old code draws from a new torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class LightningModule(nn.Module):
    """The parts of lightning's that inference touches."""

    def save_hyperparameters(self) -> None:
        pass

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class _Inert:
    """May be called, asked for any attribute and inherited from, and does nothing."""

    def __call__(self, *arguments, **options) -> "_Inert":
        return self

    def __getattr__(self, name: str) -> "_Inert":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()


class _InertModule(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return LightningModule if name == "LightningModule" else _Inert()


class _StandIns:
    """Finds the packages of these names, with all that is in them."""

    def __init__(self, packages: tuple[str, ...]):
        self.packages = packages

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
