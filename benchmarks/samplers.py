"""Who is timed: every implementation in an operator's registry, and the operator's peers."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor

from benchmarks.cases import SEED
from benchmarks.peers import HEAD_PEERS, Peer
from unmask.kernels import sample_head
from unmask.kernels.dispatch import Implementation, Operator

Draw = Callable[[Tensor, Tensor | None, Tensor], Tensor]  # (hidden, weight, keys) -> tokens


@dataclass(frozen=True)
class Sampler:
    """`kind`: "implementation" or "peer". `lacks`: why it cannot run here, or None."""

    name: str
    kind: str
    draw: Draw
    lacks: str | None = None


def head_samplers(part: str, device: str) -> list[Sampler]:
    """All that can compute a part of sample_head, also those that cannot do it here."""
    ours = [_implementation(one) for one in operator("sample_head").implementations]
    return ours + [_peer(one, device) for one in HEAD_PEERS if part in one.parts]


def operator(name: str) -> Operator:
    """An operator's registry entry; the attribute of unmask.kernels with its name is the function."""
    return import_module(f"unmask.kernels.{name}").OPERATOR


def _implementation(one: Implementation) -> Sampler:
    def draw(hidden: Tensor, weight: Tensor | None, keys: Tensor) -> Tensor:
        # On a GPU without `check`, which would wait for the device.
        check = hidden.device.type == "cpu"
        return sample_head(hidden, weight, keys=keys, seed=SEED, check=check, impl=one.name).tokens

    usable, reason = one.status()
    return Sampler(one.name, "implementation", draw, reason if not usable or one.on_request() else None)


def _peer(one: Peer, device: str) -> Sampler:
    return Sampler(one.name, "peer", lambda hidden, weight, keys: one.draw(hidden, weight), one.lacks(device))
