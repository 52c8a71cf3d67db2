"""A peer: another way from hidden rows to tokens, with noise of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_LOGITS = 1 << 30  # of one chunk: 4 GiB in fp32, and few enough for kernels that number them in 32 bits


@dataclass(frozen=True)
class Peer:
    """`draw(hidden, weight)`: tokens [R]; weight None: hidden holds the logits. `lacks(device)`: why it cannot run."""

    name: str
    draw: Callable[[Tensor, Tensor | None], Tensor]
    lacks: Callable[[str], str | None] = lambda device: None
    parts: tuple[str, ...] = ("whole", "sampling")


def chunks(hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    """Rows whose logits fit: a peer that stores logits cannot have 65,536 rows of them at once."""
    vocab_size = hidden.shape[1] if weight is None else len(weight)
    return hidden.split(max(1, _LOGITS // vocab_size))


def product(hidden: Tensor, weight: Tensor | None) -> Tensor:
    return hidden if weight is None else hidden @ weight.T
