"""What is timed: an operator at a size, described by a `Point`, its tensors made by the operator's `Family`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.shapes import Shape

SEED = 0
_LIKE_FP32 = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 1e-5)


class Case(ABC):
    """The tensors of one call of an operator.

    sizes      of the call, by name
    num_bytes  every input read once and every output written once
    flops      counted by hand; each subclass says what of
    tolerance  see `allowed`, by dtype
    """

    tolerance: ClassVar[Mapping[torch.dtype, float]] = _LIKE_FP32

    @property
    @abstractmethod
    def operand(self) -> Tensor:
        """One whose dtype and device are those of the call."""

    @property
    def dtype(self) -> torch.dtype:
        return self.operand.dtype

    @property
    def device(self) -> torch.device:
        return self.operand.device

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int: ...

    @property
    @abstractmethod
    def flops(self) -> int: ...

    @abstractmethod
    def run(self, impl: str) -> object:
        """The call, by one implementation; on a GPU nothing waits for the device."""

    def allowed(self, output: str) -> float:
        """|found - reference| / |reference| of an output that may be; more would be an error and not rounding."""
        return self.tolerance[self.dtype]

    def compare(self, impl: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the implementation writes, all of it or as many rows as the reference can do in a moment, and what the
        reference does. Only samplers are checked in another way."""
        raise NotImplementedError


@dataclass(frozen=True)
class Family:
    """All cases of one operator.

    parts   name -> what of the operator it times
    counts  "rows" or "sequences": what is few or many; `unit` is its letter
    usual   counts that are timed unless others are asked for, by device
    build   (part, shape, count, dtype, device) -> Case
    fits    whether a case of these sizes can be had: (part, shape, count)
    """

    parts: Mapping[str, str]
    counts: str
    unit: str
    usual: Mapping[str, tuple[int, ...]]
    build: Callable[[str, Shape, int, torch.dtype, torch.device], Case]
    fits: Callable[[str, Shape, int], bool] = lambda part, shape, count: True


def family(operator: str) -> Family:
    """The module of this folder with the operator's name says how its cases are made."""
    return import_module(f"benchmarks.cases.{operator}").FAMILY


@dataclass(frozen=True)
class Point:
    """A case before its tensors are made. `model`: the name of the shape."""

    operator: str
    part: str
    model: str
    shape: Shape
    count: int

    @property
    def name(self) -> str:
        return f"{self.part} {self.model} {family(self.operator).unit}={self.count}"

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Case:
        return family(self.operator).build(self.part, self.shape, self.count, dtype, device)

    def tiny(self) -> "Point":
        """The same code on next to no data."""
        shape = self.shape._replace(vocab_size=128, length=min(self.shape.length, 16))
        return Point(self.operator, self.part, "tiny", shape, 1)
