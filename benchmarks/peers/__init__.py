"""What a user would run instead. Of `sample_head`, written by us: adding one is a function and a line in HEAD_PEERS.
Of a whole step, the published sampler itself: see mdlm.py. Of whole runs: see samplers.py.

Packages that may be missing are imported by the first draw.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.peers import torch_chain
from benchmarks.peers.peer import Peer, chunks, product


def flashinfer(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """The head's product by cuBLAS, then FlashInfer's Gumbel sampler over the stored logits."""
    draw = import_module("flashinfer.sampling").sampling_from_logits
    return torch.cat([draw(product(rows, weight).float()) for rows in chunks(hidden, weight)]).long()


def flash_sampling_style(hidden: Tensor, weight: Tensor | None) -> Tensor:
    return import_module("benchmarks.peers.flash_sampling_style").draw(hidden, weight)


def _on_gpu_with(module: str, package: str):
    def lacks(device: str) -> str | None:
        if device != "cuda":
            return "needs a GPU"
        return None if find_spec(module) else f"{package} is not installed (pip install {package})"

    return lacks


HEAD_PEERS: tuple[Peer, ...] = (
    Peer("torch, published chain", torch_chain.published),
    Peer("torch, exponential_", torch_chain.exponential),
    Peer("torch, fp32 Gumbel", torch_chain.gumbel),
    Peer("torch + FlashInfer", flashinfer, _on_gpu_with("flashinfer", "flashinfer-python")),
    Peer("FlashSampling style", flash_sampling_style, _on_gpu_with("triton", "triton"), parts=("whole",)),
)
