"""MDLM's `Diffusion._sample`, github.com/kuleshov-group/mdlm.

Its predictors are served by `unmask.Ancestral` on its own time grid: "ddpm", "ddpm_cache" (which reuses a network call
when no sequence of the batch has changed; here a sequence in which nothing is revealed costs none) and "analytic",
whose transition is that of the ancestral step when the law is normalised, as MDLM's is. Sahoo et al. 2024,
arXiv 2406.07524.
"""

from typing import Any

import torch
from torch import Tensor

from unmask.dropin import absorbing, patching
from unmask.dropin.absorbing import Options, Trajectory
from unmask.dropin.backbones import Network, denoiser, setting
from unmask.dropin.stepwise import Arithmetic, Stepwise, probabilities

PREDICTORS = "ddpm", "ddpm_cache", "analytic"
PUBLISHED = Arithmetic(torch.bfloat16, torch.float32, torch.float32, bias=1e-10, competes=True)


def fits(obj: Any) -> bool:
    """Whether `obj` is a Diffusion of MDLM's."""
    return patching.has(obj, "_sample", "_ddpm_update", "_ddpm_caching_update")


def patch(
    obj: Any,
    *,
    seed: int | None = None,
    compat: str | None = None,
    dtype: torch.dtype | None = None,
    max_batch: int = 16,
) -> None:
    """Replace `_sample` of a live Diffusion; `restore_model_and_sample` calls it and needs no replacement.

    Options are those of `Options`. Raises ValueError for what is not served, and if `obj` is patched already.
    """
    options = Options("mdlm", seed, compat, dtype, max_batch)
    check(obj, compat)

    def _sample(self, num_steps=None, eps=1e-5):
        return _run(self, num_steps, eps, options)

    patching.replace(obj, {"_sample": _sample})


def unpatch(obj: Any) -> None:
    """Put `_sample` back. Raises ValueError if `obj` is not patched."""
    patching.restore(obj)


def _sample(self: Any, num_steps: int | None = None, eps: float = 1e-5, **options: Any) -> Tensor:
    """Samples int64 [config.loader.eval_batch_size, config.model.length], on the device of the backbone.

    num_steps: config.sampling.steps unless given. eps: the time at which the steps end. Positions that are masked then
    are drawn from the same law if config.sampling.noise_removal, else they keep the mask id. Options are those of
    `Options`; compat="mdlm": log p in bf16, noise of fp32 uniforms with their bias, in which the mask id competes, and
    the likeliest tokens in the end.
    """
    return _run(self, num_steps, eps, Options("mdlm", **options))


def check(obj: Any, compat: str | None) -> None:
    """Raise ValueError for a Diffusion that is not served."""
    if getattr(obj, "mask_index", None) is None:
        raise ValueError(f"obj must have mask_index, the id of its mask token, got {patching.named(obj)} without")
    if obj.sampler not in PREDICTORS:
        raise ValueError(f"config.sampling.predictor must be one of {', '.join(PREDICTORS)}, got {obj.sampler!r}")
    served = ("subs", "sedd") if obj.sampler == "analytic" and compat is None else ("subs",)
    if obj.parameterization not in served:
        raise ValueError(
            f"parameterization must be {' or '.join(served)} for the predictor {obj.sampler!r}, "
            f"compat {compat}; got {obj.parameterization!r}"
        )
    noise = setting(obj.config, "noise.type")
    if obj.sampler == "ddpm_cache" and noise != "loglinear":
        raise ValueError(f"config.noise.type must be loglinear for the predictor 'ddpm_cache', got {noise!r}")


def _run(obj: Any, num_steps: int | None, eps: float, options: Options) -> Tensor:
    check(obj, options.compat)
    times = absorbing.linear_times(obj.config.sampling.steps if num_steps is None else num_steps, eps)
    chances = mask_chances(obj, times)
    network = network_of(obj, float(chances[0]))
    made, template = denoiser(network, options.dtype), prior(obj).to(network.device)
    trajectory, last = Trajectory.ancestral((chances / chances[0]).numpy()), last_of(obj, options)
    if options.compat is None:
        return absorbing.sample(made, template, trajectory, options, last=last)
    run = Stepwise(made, probabilities(obj.mask_index, PUBLISHED), PUBLISHED)
    return run.sample(template, trajectory, options, last=last)


def last_of(obj: Any, options: Options) -> str:
    """What becomes of positions that are masked after the last step."""
    if not obj.config.sampling.noise_removal:
        return "leave"
    return "argmax" if options.compat and obj.sampler != "analytic" else "draw"


def mask_chances(obj: Any, times: Tensor) -> Tensor:
    """float64 [N + 1], at these times: 1 - exp(-sigma)."""
    return -torch.expm1(-obj.noise(times)[0].double().cpu())


def prior(obj: Any) -> Tensor:
    """Where sampling begins, int64 [B, L]; a `_sample_prior` of one's own may give tokens."""
    shape = int(obj.config.loader.eval_batch_size), int(obj.config.model.length)
    return absorbing.check_tokens("_sample_prior", obj._sample_prior(*shape), shape, obj.vocab_size)


def network_of(obj: Any, most: float) -> Network:
    """most: the mask chance at time 1."""
    return Network(
        backbone=obj.backbone,
        config=_config(obj),
        vocab_size=obj.vocab_size,
        mask_id=obj.mask_index,
        length=int(obj.config.model.length),
        time_conditioned=bool(obj.time_conditioning),
        most=most,
        logits=lambda tokens, sigma: obj.forward(tokens, sigma[:, None]),
    )


def _config(obj: Any) -> dict[str, Any]:
    hub = getattr(obj.backbone, "config", None)
    if getattr(hub, "model_type", None) == "mdlm":  # backbone "hf_dit"
        return {**hub.to_dict(), "time_conditioning": bool(obj.time_conditioning)}
    sizes = ("hidden_size", "n_blocks", "n_heads", "length")
    return {
        "model": {size: setting(obj.config, f"model.{size}") for size in sizes},
        "time_conditioning": bool(obj.time_conditioning),
        "parameterization": obj.parameterization,
        "noise": {"type": "loglinear"},  # as far as the network sees: its sigma follows from the mask rate
    }
