"""The training losses at masked positions, a few rows of logits at a time."""

import torch
from torch import Tensor

CHUNK_ROWS = 512  # their logits stay in the second-level cache for vocabularies of a few thousand


def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, mask_id: int, targets: Tensor, scale: Tensor) -> Tensor:
    """Σ scale · −log p(target), a float32 scalar, with gradients in hidden, weight and bias.

    hidden: [R, D] before the head. weight [V, D], bias [V]: the head. targets: int64 [R]. scale: float32 [R]. p is the
    softmax without `mask_id`. Products are in bf16 inside such an autocast. No [R, V] tensor exists: the gradient is
    taken with the value, as in Liger's fused linear cross entropy (Hsu et al. 2024).
    """
    return _CrossEntropy.apply(hidden, weight, bias, mask_id, targets, scale)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, mask_id, targets, scale):
        narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        rows, head = hidden.to(narrow), weight.to(narrow)
        of_hidden, of_weight, of_bias = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
        total = torch.zeros((), dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(rows), CHUNK_ROWS):
                part = slice(start, start + CHUNK_ROWS)
                logits = (rows[part] @ head.T).float().add_(bias)
                logits[:, mask_id] = -torch.inf
                top = logits.amax(1, keepdim=True)
                chosen = logits.gather(1, targets[part, None])
                law = logits.sub_(top).exp_()
                sums = law.sum(1, keepdim=True)
                total += scale[part] @ (sums.log() + top - chosen)[:, 0]
                law *= scale[part, None] / sums
                law.scatter_add_(1, targets[part, None], -scale[part, None])
                of_bias += law.sum(0)
                law = law.to(narrow)
                torch.mm(law, head, out=of_hidden[part])
                of_weight += law.T @ rows[part]
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx, upstream):
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        return of_hidden * upstream, of_weight * upstream, of_bias * upstream, None, None, None
