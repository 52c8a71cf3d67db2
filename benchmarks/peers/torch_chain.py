"""The head's product by torch, then a chain of torch operators over the stored logits."""

import torch
from torch import Tensor

from benchmarks.peers.peer import chunks, product


def published(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """The chain of published masked diffusion samplers, in the dtype of the logits: argmax of p / exponential noise."""

    def draw(rows: Tensor) -> Tensor:
        p = product(rows, weight).log_softmax(-1).exp()
        noise = 1e-10 - (torch.rand_like(p) + 1e-10).log()
        return (p / noise).argmax(-1)

    return torch.cat([draw(rows) for rows in chunks(hidden, weight)])


def exponential(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """The same with torch's own exponential noise."""

    def draw(rows: Tensor) -> Tensor:
        p = product(rows, weight).log_softmax(-1).exp()
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    return torch.cat([draw(rows) for rows in chunks(hidden, weight)])


def gumbel(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """argmax of logits + Gumbel noise in fp32, the uniform clamped away from 0; no softmax."""

    def draw(rows: Tensor) -> Tensor:
        logits = product(rows, weight).float()
        uniform = torch.rand_like(logits).clamp_(min=torch.finfo(torch.float32).tiny)
        return (logits - (-uniform.log()).log()).argmax(-1)

    return torch.cat([draw(rows) for rows in chunks(hidden, weight)])


def head_alone(hidden: Tensor, weight: Tensor) -> None:
    for rows in chunks(hidden, weight):
        product(rows, weight)
