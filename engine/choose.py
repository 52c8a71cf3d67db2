"""What token is written? Frozen options of a token choice."""

import math
from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True)
class Categorical:
    """Draw from softmax(logits / temperature) without the mask id.

    temperature: 1 is the model's own law; 0 is greedy, the likeliest id, the lowest on a tie.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        value = self.temperature
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"temperature must be a number, got {value!r}")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"temperature must be finite and at least 0, got {value}")
