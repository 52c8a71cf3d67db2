"""What is sampled end to end: networks with their weights, and how many texts of them on which device."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import unmask
from benchmarks.network import NETWORKS, Network, denoiser, random_tensors
from benchmarks.peers.plain import PlainDiT
from unmask.checkpoints import read
from unmask.denoiser import Denoiser
from unmask.models.dit import Shape, tensor_shapes

_COND_DIM = 8  # of the modulation that a network without one is given
_CPU = torch.device("cpu")


class Size(NamedTuple):
    """batch: texts of a run. length: tokens of each. num_steps: of the trajectory. num_reveals: positions that a
    sampler of one position per network call reveals before its time is extrapolated to all."""

    batch: int
    length: int
    num_steps: int
    num_reveals: int


WORKLOADS: dict[str, dict[str, Size]] = {  # by device
    "sotu-heavy": {"cpu": Size(4, 256, 256, 256), "cuda": Size(64, 256, 256, 256)},
    "mdlm-small": {"cpu": Size(1, 1024, 16, 8), "cuda": Size(16, 1024, 128, 64)},
}


def sized(name: str, device: str, **given: int) -> Size:
    """The size of a workload on a device, others where given; ValueError for a length beyond its network's."""
    size = WORKLOADS[name][device]._replace(**given)
    longest = None if name in NETWORKS else read(name).spec.max_length
    if longest and size.length > longest:
        raise ValueError(f"--length must be at most {longest} for {name}, got {size.length}")
    return size._replace(num_reveals=min(size.num_reveals, size.length))


@dataclass(frozen=True, eq=False)
class Job:
    """Runs that every sampler is asked for, with the same weights.

    tensors: by their published names, adaLN included, in fp32 on the CPU. model: our denoiser of them. dtype: of the
    products.
    """

    network: Network
    tensors: Mapping[str, Tensor]
    model: Denoiser
    size: Size
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def plain(self) -> PlainDiT:
        """One for all peers that call it."""
        return PlainDiT(self.network, self.tensors, self.dtype, self.device)


def workload(name: str, size: Size, dtype: torch.dtype, device: torch.device) -> Job:
    """The job of that name."""
    if name in NETWORKS:
        network = NETWORKS[name]._replace(length=size.length)
        return random_job(network, size, dtype, device)
    found = read(name)
    spec = found.spec
    shape = Shape(spec.vocab_size, spec.hidden_size, spec.num_blocks, spec.intermediate_size, _COND_DIM)
    network = Network(shape, spec.num_heads, size.length)
    model = unmask.load(name, dtype=dtype, device=device)
    return Job(network, _modulated(found.parameters, shape), model, size, dtype, device)


def random_job(network: Network, size: Size, dtype: torch.dtype, device: torch.device) -> Job:
    tensors = random_tensors(network, _CPU)
    return Job(network, tensors, denoiser(network, tensors, dtype, device), size, dtype, device)


def opening(job: Job) -> Tensor:
    """Tokens int64 [1, L] in which all but `num_reveals` positions, the first and the last ones, are given: random
    tokens, as good as any in a network call."""
    _, length, _, num_reveals = job.size
    tokens = torch.randint(job.network.mask_id, (1, length), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = tokens[:, length - num_reveals + 1 :] = job.network.mask_id
    return tokens.to(job.device)


def _modulated(tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The same function in the published layout: a head of its own, and adaLN that shifts by 0, scales by 1 and lets
    all through."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors = {"output_layer.linear.weight": tensors["vocab_embed.embedding"], **tensors}
    made = {name: tensors.get(name, torch.zeros(size)) for name, size in tensor_shapes(shape).items()}
    for i in range(shape.num_blocks):
        _, _, gate1, _, _, gate2 = made[f"blocks.{i}.adaLN_modulation.bias"].chunk(6)
        gate1.fill_(1)
        gate2.fill_(1)
    return made
