"""Duo's `generate_samples` for absorbing models (MDLM, SEDDAbsorb), github.com/s-sahoo/duo.

Its predictors "ancestral", "ancestral_cache" and "analytic" have one law on the absorbing process, that of
`unmask.Ancestral` on its time grid; "psi" masks again with chances of its own, and is run step by step. What is left in
the end is drawn, taken greedily or left, as config.sampling says. Sahoo et al. 2025, arXiv 2506.10892.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.choose import Categorical
from unmask.dropin import absorbing, patching
from unmask.dropin.absorbing import Options, Trajectory
from unmask.dropin.backbones import Network, denoiser, setting
from unmask.dropin.stepwise import Arithmetic, Stepwise, nucleus, probabilities

PREDICTORS = "ancestral", "ancestral_cache", "analytic", "psi"
LAST = {"ancestral": "draw", "greedy": "argmax", "none": "leave"}  # config.sampling.noise_removal
PUBLISHED = Arithmetic(torch.bfloat16, torch.float64, torch.float64, bias=1e-10, competes=True)


def fits(obj: Any) -> bool:
    """Whether `obj` is a Diffusion of Duo's code."""
    return patching.has(obj, "generate_samples", "_ancestral_update")


def patch(
    obj: Any,
    *,
    seed: int | None = None,
    compat: str | None = None,
    dtype: torch.dtype | None = None,
    max_batch: int = 16,
) -> None:
    """Replace `generate_samples` of a live model; `restore_model_and_sample` calls it and needs no replacement.

    Options are those of `Options`. Raises ValueError for what is not served, and if `obj` is patched already.
    """
    options = Options("duo", seed, compat, dtype, max_batch)
    check(obj, compat)

    def generate_samples(self, num_samples, labels=None, num_steps=None, eps=1e-5):
        return _run(self, num_samples, labels, num_steps, eps, options)

    patching.replace(obj, {"generate_samples": generate_samples})


def unpatch(obj: Any) -> None:
    """Put `generate_samples` back. Raises ValueError if `obj` is not patched."""
    patching.restore(obj)


def generate_samples(
    self: Any,
    num_samples: int,
    labels: Tensor | None = None,
    num_steps: int | None = None,
    eps: float = 1e-5,
    **options: Any,
) -> Tensor:
    """Samples int64 [num_samples, num_tokens], on the device of the backbone.

    labels: must be None. num_steps: config.sampling.steps unless given. eps: the time at which the steps end.
    Tokens are drawn from the nucleus of `p_nucleus`. The predictor "psi" takes the slow path, with one warning. Options
    are those of `Options`; compat="duo": log p in bf16, noise of fp64 uniforms with their bias, in which the mask id
    competes.
    """
    return _run(self, num_samples, labels, num_steps, eps, Options("duo", **options))


def check(obj: Any, compat: str | None, labels: Tensor | None = None) -> None:
    """Raise ValueError for a model or a call that is not served."""
    if getattr(obj, "mask_index", None) is None:
        raise ValueError(
            f"obj must be a model of the absorbing process, which has mask_index, got {patching.named(obj)} without"
        )
    if obj.sampler not in PREDICTORS:
        raise ValueError(f"config.sampling.predictor must be one of {', '.join(PREDICTORS)}, got {obj.sampler!r}")
    served = ("subs", "score") if obj.sampler == "analytic" and compat is None else ("subs",)
    if obj.parameterization not in served:
        raise ValueError(
            f"config.algo.parameterization must be {' or '.join(served)} for the predictor {obj.sampler!r}, "
            f"compat {compat}; got {obj.parameterization!r}"
        )
    if obj.config.sampling.noise_removal not in LAST:
        raise ValueError(
            f"config.sampling.noise_removal must be one of {', '.join(LAST)}, got {obj.config.sampling.noise_removal!r}"
        )
    if labels is not None:
        raise ValueError(f"labels must be None: no class is told to the model here, got {type(labels).__name__}")


def _run(
    obj: Any, num_samples: int, labels: Tensor | None, num_steps: int | None, eps: float, options: Options
) -> Tensor:
    check(obj, options.compat, labels)
    trajectory, most = _trajectory(obj, obj.config.sampling.steps if num_steps is None else num_steps, eps)
    network, shape = network_of(obj, most), (num_samples, obj.num_tokens)
    made, last = denoiser(network, options.dtype), LAST[obj.config.sampling.noise_removal]
    template = absorbing.check_tokens("prior_sample", obj.prior_sample(*shape), shape, obj.vocab_size)
    template = template.to(network.device)
    top_p = 1.0 if obj.sampler == "analytic" else float(obj.p_nucleus)  # the analytic step knows no nucleus
    if options.compat is None and trajectory.policy is not None:
        choose = Categorical(top_p=top_p)
        return absorbing.sample(made, template, trajectory, options, last=last, choose=choose)
    if options.compat is None:
        patching.warn_once("the predictor 'psi' is not planned ahead: steps are taken one by one")
    arithmetic = PUBLISHED if options.compat else Arithmetic()
    law = nucleus(probabilities(obj.mask_index, arithmetic), top_p)
    return Stepwise(made, law, arithmetic).sample(template, trajectory, options, last=last)


@torch.no_grad()
def _trajectory(obj: Any, num_steps: int, eps: float) -> tuple[Trajectory, float]:
    """Also the mask chance at time 1."""
    times = absorbing.linear_times(num_steps, eps)
    if obj.sampler == "psi":
        times = obj._get_sampling_time_profile(eps, num_steps).double().cpu()
    chances = (1 - obj.noise(times)[1].double().cpu()).numpy()
    if obj.sampler == "psi":
        return _psi(chances, obj._get_kappas(times).double().cpu().numpy()), float(chances[0])
    return Trajectory.ancestral(chances / chances[0]), float(chances[0])


def _psi(chances: np.ndarray, kappas: np.ndarray) -> Trajectory:
    """Each step is the ancestral one with weight kappa; else everything is revealed, and masked again by the forward
    process of the step's end. chances, kappas: float64 [N + 1], the mask chances at the times, and kappa."""
    before, after, kappa = chances[:-1], chances[1:], kappas[:-1]
    reveal = kappa * (before - after) / before + (1 - kappa) * (1 - after)
    return Trajectory(chances / chances[0], reveal, (1 - kappa) * after, None)


def network_of(obj: Any, most: float) -> Network:
    """most: the mask chance at time 1."""
    sizes = ("hidden_size", "n_blocks", "n_heads", "length")
    return Network(
        backbone=obj.backbone,
        config={
            "model": {size: setting(obj.config, f"model.{size}") for size in sizes},
            "time_conditioning": bool(obj.time_conditioning),
            "parameterization": "sedd" if obj.parameterization == "score" else obj.parameterization,
            "noise": {"type": "loglinear"},  # as far as the network sees: its sigma follows from the mask rate
        },
        vocab_size=obj.vocab_size,
        mask_id=obj.mask_index,
        length=int(obj.num_tokens),
        time_conditioned=bool(obj.time_conditioning),
        most=most,
        logits=lambda tokens, sigma: obj.forward(tokens, sigma[:, None]),
    )
