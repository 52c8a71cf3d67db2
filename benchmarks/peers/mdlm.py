"""The published MDLM sampler, github.com/kuleshov-group/mdlm, imported from a checkout and run as it is.

Its network (models/dit.py) and its sampler (diffusion.py, `ddpm` and `ddpm_cache`) are the checkout's own lines. What
these import for training alone is replaced by stand-ins that do nothing, and flash-attention, which wants a GPU, by
torch's SDPA and the same rotation in plain torch. einops, which the network calls, must be installed.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.network import Network
from benchmarks.peers.checkout import Checkout, importable, quiet
from benchmarks.peers.run import Run
from benchmarks.trajectory import EPS
from benchmarks.workloads import Job

CHECKOUT = Checkout(
    "mdlm", "a checkout of github.com/kuleshov-group/mdlm", ("diffusion.py", "models/dit.py"), ("einops",)
)
_MODULES = ("dataloader", "diffusion", "models", "noise_schedule", "utils")


class Published:
    """The sampler with the given weights. `narrow`: its products in bf16 by autocast, as published for a GPU. There it
    asks for that itself; on a CPU it does not, and autocast is put around each step."""

    def __init__(self, checkout: Path, network: Network, tensors: Mapping[str, Tensor], device: torch.device):
        installed = torch.cuda.is_available() and find_spec("flash_attn")
        with quiet(), importable(checkout, _MODULES, given={} if installed else _flash_attn()):
            self.module = importlib.import_module("diffusion")
            tokenizer = SimpleNamespace(vocab_size=network.shape.vocab_size - 1)
            self.diffusion = self.module.Diffusion(_config(network), tokenizer)
        backbone = self.diffusion.backbone
        backbone.load_state_dict({**tensors, "rotary_emb.inv_freq": backbone.rotary_emb.inv_freq})
        self.diffusion.to(device).eval()
        self.device = device

    def log_probs(self, tokens: Tensor, narrow: bool = False) -> Tensor:
        """log p(x0 | tokens) [B, L, V]."""
        with quiet(), torch.no_grad(), self._precision(narrow):
            return self.diffusion.forward(tokens, torch.zeros(len(tokens), 1, device=self.device))

    def step(self, tokens: Tensor, num_steps: int, narrow: bool, p_x0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step from the middle of a trajectory: (p(x0), tokens). The network runs unless p(x0) is given."""
        t = torch.full((len(tokens), 1), 0.5, device=self.device)
        with quiet(), torch.no_grad(), self._precision(narrow):
            return self.diffusion._ddpm_caching_update(tokens, t, (1 - EPS) / num_steps, p_x0=p_x0)

    def last(self, tokens: Tensor, narrow: bool) -> Tensor:
        """What follows the last step: the likeliest tokens."""
        return self.log_probs(tokens, narrow).argmax(-1)

    def steps(self, tokens: Tensor, num_steps: int, first: int, count: int, narrow: bool) -> list[float]:
        """Seconds of `count` steps of `_sample(num_steps)` that call the network, from step `first` on.

        That step begins with `tokens`. The steps before are not run, and it is stopped after the last.
        """
        sampler, stamps, numbers = self.diffusion, [], itertools.count()
        update = type(sampler)._ddpm_caching_update

        def window(x: Tensor, t: Tensor, dt: float, p_x0: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
            if next(numbers) < first:
                return None, x
            stamps.append((time.perf_counter(), p_x0 is None))
            if sum(called for _, called in stamps) > count:
                raise _Enough
            with self._precision(narrow):
                return update(sampler, x, t, dt, p_x0=p_x0)

        sampler._ddpm_caching_update = window
        try:
            with quiet(), self._beginning(tokens), suppress(_Enough):
                sampler._sample(num_steps)
        finally:
            del sampler._ddpm_caching_update
        return [after - before for (before, called), (after, _) in itertools.pairwise(stamps) if called]

    def sample(self, batch: int, num_steps: int, predictor: str, narrow: bool) -> Tensor:
        """A whole run, `_sample(num_steps)`, by "ddpm" or "ddpm_cache": tokens [B, L]."""
        self.diffusion.sampler, self.diffusion.config.loader.eval_batch_size = predictor, batch
        with quiet(), self._precision(narrow):
            return self.diffusion._sample(num_steps)

    @contextmanager
    def wide_noise(self) -> Iterator[None]:
        """Draws in fp64 inside, which is all that changes."""
        draw = self.module._sample_categorical
        self.module._sample_categorical = lambda probs: draw(probs.double())
        try:
            yield
        finally:
            self.module._sample_categorical = draw

    def split(self, run: Callable[[], object]) -> dict[str, float]:
        """Seconds that one step on a CPU spends in the network's body, in its head, and in all the rest."""
        stamps: list[float] = []
        head = self.diffusion.backbone.output_layer.linear
        modules = (self.diffusion.backbone, head)

        def stamp(*arguments) -> None:
            stamps.append(time.perf_counter())

        hooks = [hook(stamp) for one in modules for hook in (one.register_forward_pre_hook, one.register_forward_hook)]
        stamp()
        run()
        stamp()
        for hook in hooks:
            hook.remove()
        begin, in_body, in_head, after_head, _, end = stamps
        sampling = end - begin - (after_head - in_body)
        return {"body": in_head - in_body, "head": after_head - in_head, "sampling": sampling}

    @contextmanager
    def _beginning(self, tokens: Tensor) -> Iterator[None]:
        """Runs begin with these tokens [B, L] inside."""
        self.diffusion.config.loader.eval_batch_size = len(tokens)
        self.diffusion._sample_prior = lambda *sizes: tokens
        try:
            yield
        finally:
            del self.diffusion._sample_prior

    def _precision(self, narrow: bool):
        return torch.autocast("cpu", torch.bfloat16) if narrow and self.device.type == "cpu" else nullcontext()


class _Enough(Exception):
    """Ends the published loop."""


def refuses(job: Job) -> str | None:
    """Why it does not serve the job, or None."""
    if job.device.type == "cuda" and job.dtype is not torch.bfloat16:
        return f"on a GPU its products are bf16 whatever is asked for, got {job.dtype}"
    return None


def prepare(job: Job, checkout: Path, *, predictor: str, wide_noise: bool = False) -> Run:
    """Whole runs by "ddpm" or "ddpm_cache"; wide_noise: with noise in fp64."""
    published, narrow = _published(job, checkout), job.dtype is torch.bfloat16
    batch, _, num_steps, _ = job.size

    def generate() -> Tensor:
        with published.wide_noise() if wide_noise else nullcontext():
            return published.sample(batch, num_steps, predictor, narrow)

    return Run(generate, published.diffusion.backbone)


@lru_cache(maxsize=2)  # the job that is timed and the one whose law is checked
def _published(job: Job, checkout: Path) -> Published:
    """One for all variants of a job."""
    return Published(checkout, job.network, job.tensors, job.device)


def _config(network: Network) -> SimpleNamespace:
    """What `Diffusion` reads of the published configuration, for inference with the weights as they are."""
    shape = network.shape
    model = SimpleNamespace(
        hidden_size=shape.hidden_size,
        cond_dim=shape.cond_dim,
        length=network.length,
        n_blocks=shape.num_blocks,
        n_heads=network.num_heads,
        scale_by_sigma=True,
        dropout=0.1,
    )
    training = {"ema": 0, "antithetic_sampling": True, "importance_sampling": False, "change_of_variables": False}
    return SimpleNamespace(
        model=model,
        backbone="dit",
        parameterization="subs",
        time_conditioning=False,
        T=0,
        subs_masking=False,
        noise=SimpleNamespace(type="loglinear"),
        loader=SimpleNamespace(eval_batch_size=1),
        sampling=SimpleNamespace(predictor="ddpm_cache", noise_removal=True),
        training=SimpleNamespace(**training, sampling_eps=1e-3),
        eval=SimpleNamespace(gen_ppl_eval_model_name_or_path=None),
        optim=SimpleNamespace(lr=3e-4),
    )


# --- flash-attention --------------------------------------------------------------------------------------------------


def _flash_attn() -> dict[str, ModuleType]:
    """The two functions of flash-attention that the network calls, by the names under which it does."""
    package, layers, rotary, interface = (
        ModuleType(f"flash_attn{rest}") for rest in ("", ".layers", ".layers.rotary", ".flash_attn_interface")
    )
    package.layers, layers.rotary, package.flash_attn_interface = layers, rotary, interface
    rotary.apply_rotary_emb_qkv_ = rotate
    interface.flash_attn_varlen_qkvpacked_func = attend
    return {module.__name__: module for module in (package, layers, rotary, interface)}


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in place, halves apart. qkv [B, L, 3, H, D]; cos, sin [L, D / 2]. Values stay as they are."""
    cos, sin = cos[:, None, None], sin[:, None, None]
    first, second = qkv[:, :, :2].chunk(2, dim=-1)
    turned = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(turned)
    return qkv


def attend(qkv: Tensor, ends: Tensor, length: int, dropout: float, causal: bool) -> Tensor:
    """Attention of equally long sequences back to back. qkv [B L, 3, H, D] -> [B L, H, D]."""
    query, key, value = qkv.view(-1, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal)
    return attended.transpose(1, 2).reshape(len(qkv), *qkv.shape[2:])
