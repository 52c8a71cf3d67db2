"""A trained denoiser that shows another one its law, and texts for it to speak about."""

import numpy as np
from torch import Tensor

from unmask.denoiser import Denoiser
from unmask.training.bound import Masked, hidden_of
from unmask.training.loss import Teaching


class Teacher:
    """`denoiser` on up to `batch_size` windows of `length` tokens at a time."""

    def __init__(self, denoiser: Denoiser, batch_size: int, length: int) -> None:
        self.head = denoiser.head
        self._hidden = hidden_of(denoiser, batch_size, length)

    def teach(self, masked: Masked, share: Tensor) -> Teaching:
        """What it says at the masked rows; share: float32 [R]. Valid until the next call."""
        return Teaching(self._hidden(masked.tokens, masked.rows), self.head.weight, self.head.bias, share)


def random_prefixes(
    clean: np.ndarray, others: np.ndarray, times: np.ndarray, strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Windows int64 [B, L] some of which begin like those of `others`, and bool [B]: which ones do.

    With probability p(t) = exp(-strength (1 - t)), t = times [B], the first n tokens are replaced, n uniform on 1..L-1.
    This is random conditioning (Kim et al. 2025, arXiv 2504.02011; there strength is 5 and a picture's prompt is
    replaced): the student hears the teacher on more beginnings than there are texts, mostly where the mask hides nearly
    all of the rest. What follows such a prefix is no longer text, so there only the teacher is to be believed.
    """
    num, length = clean.shape
    replaced = rng.random(num) < np.exp(-strength * (1 - times))
    ends = rng.integers(1, max(2, length), num)
    inside = replaced[:, None] & (np.arange(length) < ends[:, None])
    return np.where(inside, others, clean), replaced


def check_teacher(denoiser: Denoiser, vocab_size: int, mask_id: int, tokenizer: str, length: int) -> None:
    """Raise ValueError where the two would not speak of the same ids and positions."""
    spec = denoiser.spec
    wanted = {"vocab_size": vocab_size, "mask_id": mask_id, "tokenizer": tokenizer, "shift": False}
    for name, value in wanted.items():
        if getattr(spec, name) != value:
            raise ValueError(f"teacher must have {name} {value!r}, as the student, got {getattr(spec, name)!r}")
    if spec.max_length < length:
        raise ValueError(f"teacher must take windows of {length} tokens, got one of at most {spec.max_length}")
