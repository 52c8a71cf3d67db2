"""ReMDM's `Diffusion._sample`, github.com/kuleshov-group/remdm; Wang et al. 2025, arXiv 2503.00307.

Which positions are masked again does not depend on tokens in the samplers remdm-cap, remdm-rescale and remdm-loop:
they are planned ahead by `unmask.Remask`. In remdm-conf it depends on the probabilities that tokens were drawn with,
which is `unmask.RemaskConfidence`. As in the published code config.sampling.sampler and nucleus_p count for the
predictor "ddpm_cache" alone; "ddpm" and "analytic" are those of `unmask.dropin.mdlm`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.choose import Categorical
from unmask.dropin import absorbing, mdlm, patching
from unmask.dropin.absorbing import Options, Trajectory
from unmask.dropin.backbones import denoiser, setting
from unmask.dropin.stepwise import Arithmetic, Stepwise, nucleus, probabilities
from unmask.remask import Remask, RemaskConfidence, time_grid

SCHEDULES = {"remdm-cap": "cap", "remdm-rescale": "rescale", "remdm-loop": "loop"}
SAMPLERS = "mdlm", *SCHEDULES, "forward-backward", "remdm-conf"


def fits(obj: Any) -> bool:
    """Whether `obj` is a Diffusion of ReMDM's."""
    return patching.has(obj, "_sample", "_ddpm_caching_update", "_dfm_caching_update")


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
    options = Options("remdm", seed, compat, dtype, max_batch)
    check(obj, compat)

    def _sample(self, num_steps=None, eps=1e-5):
        return _run(self, num_steps, eps, options)

    patching.replace(obj, {"_sample": _sample})


def unpatch(obj: Any) -> None:
    """Put `_sample` back. Raises ValueError if `obj` is not patched."""
    patching.restore(obj)


def _sample(self: Any, num_steps: int | None = None, eps: float = 1e-5, **options: Any) -> Tensor:
    """Samples int64 [config.loader.eval_batch_size, config.model.length], on the device of the backbone.

    Arguments are those of `unmask.dropin.mdlm._sample`. With nucleus_p below 1 tokens are drawn from the fewest of the
    likeliest that hold this mass; the published code leaves out the last of them. The sampler "forward-backward" takes
    the slow path, with one warning. compat="remdm": log p in bf16, noise of fp64 uniforms with their bias, in which the
    mask id competes, the published nucleus, and the likeliest tokens in the end.
    """
    return _run(self, num_steps, eps, Options("remdm", **options))


def check(obj: Any, compat: str | None) -> None:
    """Raise ValueError for a Diffusion that is not served."""
    mdlm.check(obj, compat)
    sampler = _sampler(obj)
    if setting(obj.config, "sampling.dfm", False):
        raise ValueError("config.sampling.dfm must be False: its corrector steps are not served, got True")
    if sampler not in SAMPLERS:
        raise ValueError(f"config.sampling.sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")


def _sampler(obj: Any) -> str:
    return setting(obj.config, "sampling.sampler", "mdlm") if obj.sampler == "ddpm_cache" else "mdlm"


def _run(obj: Any, num_steps: int | None, eps: float, options: Options) -> Tensor:
    check(obj, options.compat)
    num_steps = obj.config.sampling.steps if num_steps is None else num_steps
    times = absorbing.linear_times(num_steps, eps)
    chances = mdlm.mask_chances(obj, times)
    trajectory = _trajectory(obj, num_steps, eps, (chances / chances[0]).numpy())
    network = mdlm.network_of(obj, float(chances[0]))
    made, template = denoiser(network, options.dtype), mdlm.prior(obj).to(network.device)
    last = mdlm.last_of(obj, options)
    top_p = float(setting(obj.config, "sampling.nucleus_p", 1.0)) if obj.sampler == "ddpm_cache" else 1.0
    if options.compat is None and trajectory.policy is not None:
        return absorbing.sample(made, template, trajectory, options, last=last, choose=Categorical(top_p=top_p))
    if options.compat is None:
        patching.warn_once(f"the sampler {_sampler(obj)!r} is not planned ahead: steps are taken one by one")
    arithmetic = _published(obj) if options.compat else Arithmetic()
    law = nucleus(probabilities(obj.mask_index, arithmetic), top_p, crossing=options.compat is None)
    run = Stepwise(made, law, arithmetic, doubting=_sampler(obj) == "remdm-conf")
    return run.sample(template, trajectory, options, last=last)


def _published(obj: Any) -> Arithmetic:
    """Chances that are tensors widen the products, those of the remasking samplers are numbers and do not."""
    products = torch.float32 if _sampler(obj) in ("mdlm", "remdm-loop") else torch.bfloat16
    return Arithmetic(torch.bfloat16, products, torch.float64, bias=1e-10, competes=True)


def _trajectory(obj: Any, num_steps: int, eps: float, rates: np.ndarray) -> Trajectory:
    sampler, sampling = _sampler(obj), obj.config.sampling
    if sampler == "mdlm":
        return Trajectory.ancestral(rates)
    times = time_grid(num_steps, eps)
    if sampler == "forward-backward":
        return _forward_backward(times)
    if sampler == "remdm-conf":
        policy = RemaskConfidence(num_steps, eps)
    else:
        names = ("eta", "t_on", "t_off", "alpha_on") if sampler == "remdm-loop" else ("eta",)
        policy = Remask(num_steps, SCHEDULES[sampler], eps=eps, **{name: setting(sampling, name) for name in names})
    reveal, remask = policy.chances[:, :num_steps]
    return Trajectory(times, reveal, remask, policy)


def _forward_backward(times: np.ndarray) -> Trajectory:
    """Each step masks as much again as the ancestral process has revealed in it; the first reveals alone."""
    revealed, step = 1 - times[:-1], -np.diff(times)
    remask = np.divide(step, revealed, out=np.ones_like(step), where=revealed > 0)
    reveal = (revealed + step - (1 - remask) * revealed) / times[:-1]
    return Trajectory(times, np.clip(reveal, 0, 1), np.clip(remask, 0, 1), None)
