"""The exact law of short texts of a tiny network, and whether a sampler's texts have it."""

from collections.abc import Callable, Iterator
from itertools import permutations, product

import numpy as np
import torch

from benchmarks.network import Network
from benchmarks.peers.plain import PlainDiT
from benchmarks.peers.run import Run
from benchmarks.verify import MIN_P, Verdict, chi_square
from benchmarks.workloads import Job, Size, random_job
from unmask import Ancestral
from unmask.models.dit import Shape
from unmask.reveal import Reveal

_NETWORK = Network(Shape(4, 32, 2, 128, cond_dim=8), 2, 4)  # 3 ** 4 texts, whose law the policy decides
_SIZE = Size(batch=500, length=4, num_steps=2, num_reveals=4)
_RUNS = 8
_RUNS_OF_ONE = 300


class Laws:
    """Verdicts on samplers by name, each found once, in a tiny job of two steps: so that positions of one step and of
    two are both there."""

    def __init__(self, device: torch.device):
        self.job = random_job(_NETWORK, _SIZE, torch.float32, device)
        self.known: dict[str, Verdict] = {}

    def verdict(self, name: str, reveal: Callable[[Job], Reveal], prepare: Callable[[Job], Run]) -> Verdict:
        if name not in self.known:
            self.known[name] = check(prepare(self.job), self.job, reveal(self.job))
        return self.known[name]


def check(run: Run, job: Job, reveal: Reveal) -> Verdict:
    """Pearson's chi-square of texts of a tiny job against their exact law under the policy."""
    torch.manual_seed(0)
    num_runs = _RUNS_OF_ONE if run.num_sequences == 1 else _RUNS
    texts = torch.cat([run.generate() for _ in range(num_runs)]).cpu()
    law = exact_law(job, reveal)
    if not ((texts >= 0) & (texts < job.network.mask_id)).all():
        return Verdict(False, f"tokens from {int(texts.min())} to {int(texts.max())} for {job.network.mask_id} ids")
    places = torch.from_numpy(np.ravel_multi_index(tuple(texts.T.numpy()), law.shape))
    p = chi_square(torch.bincount(places, minlength=law.size).double(), len(texts) * torch.from_numpy(law.ravel()))
    return Verdict(p >= MIN_P, f"χ² p = {p:.2g}")


def exact_law(job: Job, reveal: Reveal) -> np.ndarray:
    """float64 [V - 1] * L, from the softmax of logits in fp64."""
    network, (_, length, *_) = job.network, job.size
    real = network.mask_id
    plain = PlainDiT(network, job.tensors, torch.float64, torch.device("cpu"))
    states = torch.cartesian_prod(*[torch.arange(real + 1)] * length)
    chances = plain(states).softmax(-1).view(*[real + 1] * length, length, real + 1)
    texts = torch.cartesian_prod(*[torch.arange(real)] * length)
    law = torch.zeros(len(texts), dtype=torch.float64)
    for steps, chance in _plans(reveal, length):
        share = torch.full_like(law, chance)
        for position, step in enumerate(steps):
            seen = texts.where(torch.tensor(steps) < step, network.mask_id)
            share *= chances[(*seen.unbind(1), torch.tensor(position), texts[:, position])]
        law += share
    return law.view(*[real] * length).numpy()


def _plans(reveal: Reveal, length: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every assignment of positions to steps that the policy may make, with its probability."""
    if isinstance(reveal, Ancestral):
        chances = -np.diff(reveal.mask_rates)
        for steps in product(range(len(chances)), repeat=length):
            yield steps, float(chances[list(steps)].prod())
        return
    orders = list(permutations(range(length)))
    for order in orders:  # all orders of the reveal times are equally likely
        times = (np.array(order)[None] + 0.5) / length
        yield tuple(reveal.plan(times, np.arange(length)).step[0].tolist()), 1 / len(orders)
