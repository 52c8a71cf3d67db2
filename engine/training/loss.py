"""The training loss at masked positions, a few rows of logits at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 512  # their logits stay in the second-level cache for vocabularies of a few thousand
IMPOSSIBLE = -1e9  # logit of the mask id; finite, so that p log p is 0 and not NaN


class Teaching(NamedTuple):
    """What another model says of the same rows.

    hidden: [R, D'] of the teacher. weight [V, D'], bias [V] or None: its head. share: float32 [R] from 0 to 1, how much
    of a row's loss is KL(teacher || student); the rest is the cross entropy of the true token.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    share: Tensor

    def rows(self, part: slice, dtype: torch.dtype, mask_id: int) -> tuple[Tensor, Tensor]:
        """log q [rows, V] and the share [rows, 1] of some rows; the product is in `dtype`."""
        log_law = _log_law(self.hidden[part].to(dtype), self.weight.to(dtype), self.bias, mask_id)
        return log_law, self.share[part, None]


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_id: int,
    targets: Tensor,
    scale: Tensor,
    teaching: Teaching | None = None,
) -> Tensor:
    """Σ scale · ((1 − share) · −log p(target) + share · KL(teacher || p)), a float32 scalar; share is 0 unless taught.

    hidden: [R, D] before the head. weight [V, D], bias [V]: the head. targets: int64 [R]. scale: float32 [R]. p is the
    softmax without `mask_id`. Products are in bf16 inside such an autocast.

    Differentiable in hidden, weight and bias. No [R, V] tensor exists: the gradient, which is p less the mixture of
    the true token and the teacher's law, is taken with the value, as in Liger's fused linear cross entropy (Hsu et al.
    2024, arXiv 2410.10989). The loss of distillation is that of Hinton et al. 2015 (arXiv 1503.02531) at temperature 1.
    """
    return _HeadLoss.apply(hidden, weight, bias, mask_id, targets, scale, teaching)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, mask_id, targets, scale, teaching):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        rows, head = hidden.to(dtype), weight.to(dtype)
        of_hidden, of_weight, of_bias = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
        total = torch.zeros((), dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(rows), CHUNK_ROWS):
                part = slice(start, start + CHUNK_ROWS)
                log_law = _log_law(rows[part], head, bias, mask_id)
                taught = None if teaching is None else teaching.rows(part, dtype, mask_id)
                loss, slope = _row_losses(log_law, targets[part], taught)
                total += scale[part] @ loss
                slope *= scale[part, None]
                of_bias += slope.sum(0)
                slope = slope.to(dtype)
                torch.mm(slope, head, out=of_hidden[part])
                of_weight += slope.T @ rows[part]
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return *(gradient * upstream for gradient in ctx.saved_tensors), None, None, None, None


def _log_law(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask_id: int) -> Tensor:
    logits = (hidden @ weight.T).float()
    if bias is not None:
        logits += bias
    logits[:, mask_id] = IMPOSSIBLE
    return logits.sub_(logits.logsumexp(1, keepdim=True))


def _row_losses(log_law: Tensor, targets: Tensor, taught: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The loss of each row [rows] and its slope in the logits [rows, V]."""
    loss = -log_law.gather(1, targets[:, None])
    slope, kept = log_law.exp(), torch.full_like(loss, -1.0)
    if taught is not None:
        log_teacher, share = taught
        law = log_teacher.exp()
        divergence = (log_teacher.sub_(log_law) * law).sum(1, keepdim=True)
        loss = (1 - share) * loss + share * divergence
        slope -= law.mul_(share)
        kept = share - 1
    return loss[:, 0], slope.scatter_add_(1, targets[:, None], kept)
