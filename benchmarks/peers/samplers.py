"""What a user would sample with instead, each with the policy of ours that has the same law. Adding one is a line."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers import bd3lm, compiled, dream, llada, mdlm
from benchmarks.peers.checkout import Checkout
from benchmarks.peers.run import Run
from benchmarks.workloads import Job
from unmask import Ancestral, FirstHitting, Fixed
from unmask.reveal import Reveal


@dataclass(frozen=True)
class SamplerPeer:
    """prepare(job, path): runs of it, the path being that of `checkout`, None where it needs none. reveal(job): our
    policy. law: how its law departs from that policy's. logit_bytes: of a logit in the widest tensor of them that it
    stores, None: as wide as the products. refuses(job): why it does not serve a job."""

    prepare: Callable[[Job, Path | None], Run]
    reveal: Callable[[Job], Reveal]
    law: str
    checkout: Checkout | None = None
    logit_bytes: int | None = None
    refuses: Callable[[Job], str | None] = lambda job: None

    def lacks(self, job: Job, path: Path | None) -> str | None:
        """Why it cannot be run, or None."""
        return (self.checkout and self.checkout.lacks(path)) or self.refuses(job)


def _ancestral(job: Job) -> Ancestral:
    return Ancestral(job.size.num_steps)


def _published(predictor: str, wide_noise: bool) -> SamplerPeer:
    noise = "fp64 noise" if wide_noise else "fp32 noise, and the mask competes: tokens rarer than 1e-7 × steps are cut"
    return SamplerPeer(
        partial(mdlm.prepare, predictor=predictor, wide_noise=wide_noise),
        _ancestral,
        f"{noise}; positions masked at the end, 1e-5 of them, take the likeliest token",
        mdlm.CHECKOUT,
        8 if wide_noise else 4,
        mdlm.refuses,
    )


PEERS: dict[str, SamplerPeer] = {
    "mdlm-ddpm": _published("ddpm", wide_noise=False),
    "mdlm-ddpm_cache": _published("ddpm_cache", wide_noise=False),
    "mdlm-fp64": _published("ddpm_cache", wide_noise=True),
    "bd3lm-first-hitting": SamplerPeer(
        bd3lm.prepare,
        lambda job: FirstHitting(),
        "fp64 noise; beyond 256 tokens texts of little entropy are refused",
        bd3lm.CHECKOUT,
        8,
        mdlm.refuses,
    ),
    "torch-compile": SamplerPeer(
        lambda job, path: compiled.prepare(job),
        _ancestral,
        "fp32 noise: tokens rarer than about 1e-7 are cut",
        None,
        4,
        compiled.refuses,
    ),
    "llada": SamplerPeer(
        llada.prepare, lambda job: Fixed(job.size.num_steps), "fp64 noise", llada.CHECKOUT, 8, llada.refuses
    ),
    "dream": SamplerPeer(dream.prepare, dream.reveal, "torch's multinomial over rounded probabilities", dream.CHECKOUT),
}
