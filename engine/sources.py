"""What a function that wants a denoiser may be handed: a live module, a denoiser, or where one is stored."""

import copy
import os
from dataclasses import replace
from typing import Any

from torch import nn

from unmask.checkpoints import load
from unmask.denoiser import Denoiser, LogitsDenoiser
from unmask.live import wrap
from unmask.models.trunk import Trunk

Model = Denoiser | nn.Module | str | os.PathLike[str]


def denoiser_of(
    model: Model,
    mask_id: int | None = None,
    *,
    shift: bool | None = None,
    tokenizer: Any = None,
) -> Denoiser:
    """A denoiser as it is, a live module wrapped (see `unmask.wrap`), or one loaded (see `unmask.load`).

    mask_id: what the caller says it is; None leaves it to the model. shift: whether row i - 1 predicts position i,
    where the caller decides that and not the model (see `DenoiserSpec`); None leaves it to the model. tokenizer: see
    `unmask.wrap`. Raises ValueError where the model's mask id is another one, or its rows cannot be shifted.
    """
    if isinstance(model, nn.Module) and not isinstance(model, Denoiser):
        model = wrap(model, mask_id=mask_id, tokenizer=tokenizer)
    elif not isinstance(model, Denoiser):
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(
                "model must be a torch module, a denoiser, a bundled name, a folder or a hub id, "
                f"got {type(model).__name__}"
            )
        model = load(model, mask_id=mask_id, tokenizer=getattr(tokenizer, "backend_tokenizer", tokenizer))
    elif tokenizer is not None:
        raise ValueError(f"tokenizer must be left out with a denoiser, got one with {model.name!r}")
    spec = model.spec
    if mask_id is not None and mask_id != spec.mask_id:
        raise ValueError(f"mask_id must be that of the model {model.name!r}, {spec.mask_id}, got {mask_id}")
    if shift is None or shift == spec.shift:
        return model
    if not isinstance(model, (LogitsDenoiser, Trunk)):
        raise ValueError(f"model must let row i - 1 predict position i, got {model.name!r}, where row i does")
    shifted = copy.copy(model)
    shifted.spec = replace(spec, shift=shift)
    return shifted
