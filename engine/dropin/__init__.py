"""Stands in for the samplers that people call today, with their signatures and return types.

>>> import unmask.dropin
>>> unmask.dropin.patch(diffusion)  # from here on its own sampling call is served here
>>> samples = diffusion.restore_model_and_sample(num_steps=1000)
>>> unmask.dropin.unpatch(diffusion)

One module per peer, imported when it is needed. Each has `fits(obj)`, whether it is this peer's object, `patch(obj,
**options)`, `unpatch(obj)`, and the peer's functions by their own names. docs/dropin.md tells what is the same and what
differs on purpose.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from unmask.dropin.patching import named, restore

__all__ = ["PEERS", "patch", "unpatch"]

PEERS = {  # module: what `patch` takes of it, in words; the first that fits serves
    "remdm": "ReMDM's Diffusion (_sample, _dfm_caching_update)",
    "duo": "Duo's model (generate_samples, _ancestral_update)",
    "mdlm": "MDLM's Diffusion (_sample, _ddpm_caching_update)",
    "sedd": "SEDD's module `sampling` (get_pc_sampler, get_sampling_fn)",
    "fast_dllm": "Fast-dLLM's module with generate_with_dual_cache",
    "llada": "LLaDA's module with generate",
    "dream": "a model of Dream's with diffusion_generate",
    "dllm": "dllm's MDLMSampler",
}


def patch(obj: Any, **options: Any) -> None:
    """Replace the sampling functions of a live object, recognised by what it has; options as of that peer's `patch`.

    Raises TypeError for an object of no known peer, ValueError if it is patched already or asks for what is not served.
    """
    peer_of(obj).patch(obj, **options)


def unpatch(obj: Any) -> None:
    """Put back exactly what `patch` replaced. Raises ValueError if `obj` is not patched."""
    restore(obj)


def peer_of(obj: Any) -> ModuleType:
    """The module that serves `obj`. Raises TypeError, which lists the known peers, if there is none."""
    for name in PEERS:
        module = import_module(f"unmask.dropin.{name}")
        if module.fits(obj):
            return module
    raise TypeError(f"obj must be one of {'; '.join(PEERS.values())}; got {named(obj)}")
