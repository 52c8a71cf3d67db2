"""Where a drop-in's seed comes from: torch's generator, as with the code it stands in for."""

import torch

from unmask.kernels.noise import check_seed


def resolve(seed: int | None) -> int:
    """`seed` itself, checked; None draws 63 bits from torch's default CPU generator.

    So `torch.manual_seed` governs: two calls differ, and repeat after the same `manual_seed`.
    """
    if seed is not None:
        return check_seed(seed)
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
