"""This library as a user would call it."""

import itertools

from torch import Tensor

from benchmarks.peers.run import Run
from benchmarks.workloads import Job, opening
from unmask import FirstHitting, Sampler
from unmask.reveal import Reveal


def prepare(job: Job, reveal: Reveal) -> Run:
    """A policy of one position per call begins where its peer does."""
    batch, length, _, num_reveals = job.size
    sampler, seeds = Sampler(job.model, reveal=reveal, max_batch=batch), itertools.count()
    one_by_one = isinstance(reveal, FirstHitting)
    prompt = opening(job)[0].cpu().numpy() if one_by_one else None

    def generate() -> Tensor:
        return sampler.sample(batch, length, seed=next(seeds), prompt=prompt).tokens

    plan = sampler.plan(batch, length, prompt=prompt)
    return Run(generate, plan.events_per_sequence, num_reveals=num_reveals if one_by_one else None)
