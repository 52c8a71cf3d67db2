"""Who computes an operator: its implementations, why each can or cannot serve, and the pick among them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch


class UnsupportedImplementation(ValueError):
    """The implementation asked for cannot serve; the message says why and lists what can."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    status() -> (usable on this machine, one line saying what it is or what it lacks)
    refuses(*arguments) -> why it cannot serve these arguments, or None
    run: the computation; called with arguments already checked by the operator
    on_request() -> whether only impl=name picks it, never impl=None
    defers(*arguments) -> whether impl=None takes it for these arguments only when no other serves them
    """

    name: str
    run: Callable
    status: Callable[[], tuple[bool, str]]
    refuses: Callable[..., str | None] = lambda *arguments: None
    on_request: Callable[[], bool] = lambda: False
    defers: Callable[..., bool] = lambda *arguments: False


class Explanation(NamedTuple):
    """A line of `unmask info`. `picked`: what impl=None takes but for arguments that it refuses or defers."""

    operator: str
    implementation: str
    usable: bool
    picked: bool
    reason: str


class Operator:
    """An operator's name and its implementations, fastest first."""

    def __init__(self, name: str, implementations: tuple[Implementation, ...]):
        self.name, self.implementations = name, implementations
        _OPERATORS[name] = self

    def pick(self, impl: str | None, *arguments) -> Implementation:
        """The implementation called `impl`, or for None the fastest one that serves these arguments.

        ValueError for an unknown name, UnsupportedImplementation for one that cannot serve.
        """
        names = [one.name for one in self.implementations]
        if impl is not None and impl not in names:
            raise ValueError(f"impl of {self.name} must be None or one of {', '.join(map(repr, names))}, got {impl!r}")
        obstacles = {one.name: _obstacle(one, arguments) for one in self.implementations}
        able = [one for one in self.implementations if obstacles[one.name] is None]
        willing = [one for one in able if impl == one.name or (impl is None and not one.on_request())]
        if willing:
            return min(willing, key=lambda one: impl is None and one.defers(*arguments))
        reasons = "; ".join(f"{name}: {obstacles[name]}" for name in ([impl] if impl else names))
        serves = ", ".join(one.name for one in able) or "none"
        raise UnsupportedImplementation(
            f"impl={impl!r} of {self.name} cannot serve this call ({reasons}); supported here: {serves}"
        )

    def explain(self) -> list[Explanation]:
        states = [(one, *one.status()) for one in self.implementations]
        picked = next((one for one, usable, _ in states if usable and not one.on_request()), None)
        return [Explanation(self.name, one.name, usable, one is picked, reason) for one, usable, reason in states]


def triton_implementation(
    operator: str,
    refuses: Callable[..., str | None],
    status: Callable[[], tuple[bool, str]] | None = None,
    **options: Callable,
) -> Implementation:
    """The function `operator` of `unmask.kernels.<operator>.triton_kernel`, imported at the first call."""

    def run(call):
        module = import_module(f"unmask.kernels.{operator}.triton_kernel")
        with _current(call.device):
            return getattr(module, operator)(call)

    return Implementation("triton", run, status or triton_status, refuses, on_request=interpreted, **options)


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Triton launches on the current GPU, whatever the tensors are on."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def triton_status() -> tuple[bool, str]:
    if not _has_triton():
        return False, "Triton is not installed (pip install triton)"
    if interpreted():
        return True, "Triton's interpreter (TRITON_INTERPRET=1): slow, for tests, on request only"
    if not torch.cuda.is_available():
        return False, "Triton is installed and torch sees no GPU"
    return True, f"Triton on {torch.cuda.get_device_name()}"


def architecture(device: torch.device) -> str:
    """sm_90 and the like, hip, or interpreter for whatever is no GPU: the name of a table of Triton tiles."""
    if device.type != "cuda":
        return "interpreter"
    return "hip" if torch.version.hip else "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def explain() -> list[Explanation]:
    """Every implementation of every operator, fastest first, with the reason why it is or is not usable."""
    return [line for operator in _OPERATORS.values() for line in operator.explain()]


_OPERATORS: dict[str, Operator] = {}


def _obstacle(implementation: Implementation, arguments: tuple) -> str | None:
    usable, reason = implementation.status()
    return implementation.refuses(*arguments) if usable else reason
