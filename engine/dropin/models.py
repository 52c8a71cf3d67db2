"""The models that drop-in functions are handed: live modules, denoisers, or where one is stored."""

import copy
import os
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import nn

from unmask.checkpoints import load
from unmask.denoiser import Denoiser, DenoiserSpec, LogitsDenoiser

Model = Denoiser | nn.Module | str | os.PathLike[str]


def denoiser_of(
    model: Model,
    mask_id: int | None = None,
    *,
    shift: bool | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
) -> Denoiser:
    """A denoiser as it is, a live module wrapped (see `unmask.wrap`), or one loaded (see `unmask.load`).

    mask_id: what the caller says it is; None leaves it to the model. shift: whether row i - 1 predicts position i,
    where the published function decides that and not the model (see `DenoiserSpec`); None leaves it to the model.
    Raises ValueError where the model's mask id is another one.
    """
    if isinstance(model, nn.Module) and not isinstance(model, Denoiser):
        model = _wrap(model, mask_id, tokenizer)
    elif not isinstance(model, Denoiser):
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(
                "model must be a torch module, a denoiser, a bundled name, a folder or a hub id, "
                f"got {type(model).__name__}"
            )
        model = load(model, tokenizer=tokenizer)
    spec = model.spec
    if mask_id is not None and mask_id != spec.mask_id:
        raise ValueError(f"mask_id must be that of the model {model.name!r}, {spec.mask_id}, got {mask_id}")
    if shift is None or shift == spec.shift:
        return model
    shifted = copy.copy(model)
    shifted.spec = replace(spec, shift=shift)
    return shifted


def _wrap(module: nn.Module, mask_id: int | None, tokenizer: object) -> Denoiser:
    parameter = next(module.parameters(), torch.empty(0))

    @torch.no_grad()
    def logits(tokens):
        output = module(tokens)
        return getattr(output, "logits", output)

    config = getattr(module, "config", None)
    vocab_size = logits(torch.zeros(1, 1, dtype=torch.int64, device=parameter.device)).shape[-1]
    if mask_id is None or not 0 <= mask_id < vocab_size:
        raise ValueError(f"mask_id must be an id of the model's vocabulary of {vocab_size}, got {mask_id}")
    length = getattr(config, "max_position_embeddings", 1 << 20)
    spec = DenoiserSpec("logits", vocab_size, mask_id, 1, 0, 1, 1, length)
    return LogitsDenoiser(logits, spec, device=parameter.device)
