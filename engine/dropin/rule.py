"""What LLaDA's loop does in a step, with the options that others have added."""

from dataclasses import dataclass
from typing import Any

from unmask.adaptive import Confidence
from unmask.choose import Categorical
from unmask.denoiser import Denoiser
from unmask.reveal import Blocks
from unmask.sampler import Sampler

REMASKING = {"low_confidence": "probability", "random": "random"}


def score_of(remasking: str) -> dict[str, Any]:
    """What a `Confidence` is told of how LLaDA scores positions."""
    if remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {', '.join(REMASKING)}, got {remasking!r}")
    return {"score": REMASKING[remasking], "untempered": remasking == "low_confidence"}


@dataclass(frozen=True)
class Rule:
    """remasking: what keeps its token, "low_confidence" what is most probable, "random" any. suppress: ids that are
    never drawn. doubted: see `Confidence`. guidance: scale of unsupervised classifier-free guidance. kept: given ids
    that stay in its unconditional input.
    """

    temperature: float = 0.0
    remasking: str = "low_confidence"
    suppress: tuple[int, ...] = ()
    doubted: tuple[int, ...] = ()
    guidance: float = 0.0
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        score_of(self.remasking)
        Categorical(self.temperature)  # its checks
        if self.guidance < 0:
            raise ValueError(f"guidance must be 0 or above, got {self.guidance}")

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for an id that the model does not have."""
        if unknown := [one for one in (*self.suppress, *self.doubted) if not 0 <= one < vocab_size]:
            raise ValueError(f"suppressed ids must be from 0 to {vocab_size - 1}, got {unknown[0]}")

    def sampler(
        self, denoiser: Denoiser, length: int, max_batch: int, policy: type[Confidence] = Confidence, **counts: Any
    ) -> Sampler:
        """Its sampler, over blocks of `length` masked positions. counts: how many a step reveals, as of `policy`."""
        self.check(denoiser.spec.vocab_size)
        if self.kept and self.guidance:
            raise ValueError(f"kept must be empty with guidance, got {self.kept}")
        score = score_of(self.remasking)
        if score["untempered"]:
            score["doubted"] = self.doubted
        return Sampler(
            denoiser,
            reveal=Blocks(policy(**score, **counts), length),
            choose=Categorical(self.temperature, suppress=self.suppress, draw_mask=True),
            guidance=self.guidance,
            max_batch=max_batch,
        )
