"""What token is written? Frozen options of a token choice."""

from dataclasses import dataclass

from unmask.arguments import checked_ids
from unmask.kernels import checks


@dataclass(frozen=True)
class Categorical:
    """Draw from softmax(logits / temperature) without the mask id, from all ids or from the likeliest only.

    temperature: 1 is the model's own law; 0 is greedy, the likeliest id, the lowest on a tie.
    top_k: draw from the k likeliest ids.
    top_p: then from the fewest of the likeliest that hold this share of their probability.
    Equal logits count in the order of their ids, the lowest first.
    suppress: ids that are never drawn. begin_suppress: ids that the first masked position of a sample does not draw.
    draw_mask: the mask id takes part in the law, and a position that draws it stays masked, as in the published code of
        LLaDA and Dream; with adaptive policies only, whose samples may then end with mask ids in them. The log-prob
        and reveal step of such a position are those of its last draw; where it was never drawn for, 0 and -1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    draw_mask: bool = False

    def __post_init__(self) -> None:
        checks.check_temperature(self.temperature)
        checks.check_top_k(self.top_k)
        checks.check_top_p(self.top_p)
        for name in ("suppress", "begin_suppress"):
            object.__setattr__(self, name, checked_ids(name, getattr(self, name)))
