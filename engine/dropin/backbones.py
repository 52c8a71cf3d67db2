"""A denoiser of the network inside a live object, of its weights as they are now."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unmask.checkpoints import build
from unmask.denoiser import Batch, Denoiser, DenoiserSpec, LogitsDenoiser
from unmask.dropin.patching import named, warn_once
from unmask.layouts import Stored
from unmask.models.dit import NOISE_EPS
from unmask.pickles import CheckpointError
from unmask.workspace import Workspace

# Mean total variation between two computations of the same laws that rounding explains, in fp32 and in fewer bits;
# another forward is far above.
_WIDE, _NARROW = 0.01, 0.1
_made: WeakKeyDictionary[nn.Module, tuple[tuple, Denoiser | None, str]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Network:
    """What a denoiser is made of.

    backbone: holds the weights. config: a configuration as `unmask.layouts` reads it, of what it would be if it were
    the published DiT. most: the mask chance of the noise at time 1. logits(tokens int64 [B, L], sigma float32 [B]) ->
    [B, L, V]: the object's own call, log p(x0 | xt) at masked positions up to a constant of the row; it may look at
    sigma only with `time_conditioned`.
    """

    backbone: nn.Module
    config: Mapping[str, Any]
    vocab_size: int
    mask_id: int
    length: int
    time_conditioned: bool
    most: float
    logits: Callable[[Tensor, Tensor], Tensor]

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.backbone.parameters()), torch.device("cpu"))

    def sigma(self, mask_rate: Tensor) -> Tensor:
        """The total noise at which this share of what time 1 masks is masked."""
        return -torch.log1p(-self.most * mask_rate)


def denoiser(network: Network, dtype: torch.dtype | None = None) -> Denoiser:
    """Our DiT with the backbone's weights, or its own forward where that is another network; then with a warning.

    dtype: of the DiT's products; None is that of the published code, bf16 on a GPU and fp32 elsewhere. The DiT is kept
    with the backbone, and made anew when a weight has changed, as it does when averaged weights are swapped in.
    """
    dtype = dtype or (torch.bfloat16 if network.device.type == "cuda" else torch.float32)
    made, why = _published(network, dtype)
    if made is not None:
        return made
    warn_once(f"{named(network.backbone)} is not the published DiT: {why}; its own forward is called for all positions")
    spec = DenoiserSpec(
        "logits", network.vocab_size, network.mask_id, 1, 0, 1, 1, network.length,
        time_conditioned=network.time_conditioned,
        num_parameters=sum(parameter.numel() for parameter in network.backbone.parameters()),
    )  # fmt: skip

    def logits(tokens: Tensor, mask_rate: Tensor | None = None) -> Tensor:
        rate = torch.ones(len(tokens), device=tokens.device) if mask_rate is None else mask_rate
        with evaluating(network.backbone):
            return network.logits(tokens, network.sigma(rate))

    return LogitsDenoiser(logits, spec, device=network.device)


def _published(network: Network, dtype: torch.dtype) -> tuple[Denoiser | None, str]:
    """Our DiT, or None and why not."""
    state = network.backbone.state_dict()
    sizes = network.vocab_size, network.mask_id, network.length, network.time_conditioned, network.most
    key = (dtype, network.device, sizes, repr(network.config), _fingerprint(state))
    if network.backbone not in _made or _made[network.backbone][0] != key:
        _made.pop(network.backbone, None)  # before another one takes as much memory
        _made[network.backbone] = (key, *_build(network, state, dtype))
    return _made[network.backbone][1:]


def _build(network: Network, state: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Denoiser | None, str]:
    if network.time_conditioned and abs(network.most - (1 - NOISE_EPS)) > 1e-6:
        return None, f"its noise masks {network.most:.6g} at time 1, where the published one masks {1 - NOISE_EPS}"
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    stored = Stored(Path(named(network.backbone)), tensors, dict(network.config))
    try:
        made = build(stored, dtype=dtype, device=network.device, mask_id=network.mask_id)
    except CheckpointError as error:
        lines = str(error).removeprefix(f"{stored.path}: ").splitlines()
        return None, " ".join(line.strip() for line in lines[:2])
    distance, tolerance = _distance(network, made)
    if distance > tolerance:
        return None, f"it has its tensors, but its laws differ by a total variation of {distance:.2g}"
    return made, ""


def _fingerprint(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Changes with any weight. Version counters do not: averaged weights are swapped in through `parameter.data`."""
    hashes = [torch.hash_tensor(tensor).view(torch.int64) for tensor in state.values() if tensor.numel()]
    return tuple(torch.stack(hashes).tolist()) if hashes else ()


@torch.no_grad()
def _distance(network: Network, made: Denoiser) -> tuple[float, float]:
    """Mean total variation between what the object and our DiT say of a few masked positions, and what is tolerated."""
    device, vocab_size, length = network.device, network.vocab_size, min(network.length, 16)
    tokens = (torch.arange(2 * length, device=device) * 7919 % vocab_size).view(2, length)
    tokens[:, ::2] = network.mask_id
    rates = torch.tensor([1.0, 0.5], device=device)
    rows, counts = (tokens == network.mask_id).flatten().nonzero().flatten(), (tokens == network.mask_id).sum(1)
    with evaluating(network.backbone):
        theirs = network.logits(tokens, network.sigma(rates)).flatten(0, 1)[rows]
    batch = Batch(tokens.flatten(), (length, length), rows, tuple(counts.tolist()), rates)
    workspace = Workspace([made.buffers(2 * length, len(rows), 2)], device)
    ours = made.hidden(batch, workspace).float() @ made.head.weight.float().T + made.head.bias.float()
    laws = [
        logits.float().index_fill(1, torch.tensor([network.mask_id], device=device), -torch.inf).softmax(1)
        for logits in (theirs, ours)
    ]
    wide = theirs.dtype == made.head.weight.dtype == torch.float32
    return float((laws[0] - laws[1]).abs().sum(1).mean() / 2), _WIDE if wide else _NARROW


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module without dropout inside; afterwards each of its parts is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def setting(config: Any, dotted: str, default: Any = None) -> Any:
    """config.model.length of a hydra configuration, a dictionary or any object with attributes; else `default`."""
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if config is None else config
