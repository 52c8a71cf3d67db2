"""Is this the same network? What a denoiser says to a fixed question tells it from others, however it is stored."""

import math
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import torch

from unmask.denoiser import Batch, Denoiser
from unmask.kernels import sample_head
from unmask.run import drawable
from unmask.workspace import Workspace

TOLERANCE = 1e-3  # nats: more than fp32 differs between machines, less than a few steps of training make
ROWS = 8


def identity(model: Denoiser) -> dict:
    """What tells a model from others, for JSON: its spec, the dtype of its hidden rows, and `entropies`.

    entropies: nats of the model's laws at `ROWS` positions spread over a text of its maximal length, every third
    position of which shows a token, the others the mask id. None stands for what is not a number.
    """
    spec = model.spec
    length, ids = spec.max_length, np.delete(np.arange(spec.vocab_size), spec.mask_id)
    place = np.arange(length)
    shown = ids[(place * 7919 + 11) % len(ids)]
    masked = place[place % 3 != 1]
    rows = torch.from_numpy(masked[np.unique(np.linspace(0, len(masked) - 1, ROWS).astype(int))]).to(model.device)
    tokens = torch.from_numpy(np.where(place % 3 == 1, shown, spec.mask_id)).to(model.device)
    rate = torch.full((1,), len(masked) / length, device=model.device)
    batch = Batch(tokens, (length,), rows, (len(rows),), rate)
    entropies, dtype = _entropies(model, batch)
    known = {name: value for name, value in asdict(spec).items() if name != "tokenizer"}
    return {**known, "tokenizer": spec.tokenizer, "dtype": dtype, "entropies": entropies}


@torch.inference_mode()
def _entropies(model: Denoiser, batch: Batch) -> tuple[list[float | None], str]:
    space = Workspace([model.buffers(len(batch.tokens), len(batch.rows), 1)], model.device)
    bias, found, dtype = drawable(model), [], ""
    for part, hidden in model.chunks(batch, space):
        keys = torch.zeros(part.stop - part.start, 3, dtype=torch.int64, device=model.device)
        entropy = sample_head(hidden, model.head.weight, bias, keys=keys, seed=0, want=("entropy",)).entropy
        found += [round(value, 6) if math.isfinite(value) else None for value in entropy.tolist()]
        dtype = str(hidden.dtype).removeprefix("torch.")
    return found, dtype


def first_difference(old: object, new: object, name: str = "") -> tuple[str, object, object] | None:
    """Where two contents of JSON files differ first: the dotted name of the place and both values; None if nowhere.

    Numbers that are not whole may differ by `TOLERANCE`. What one side lacks is None there.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*new, *old)):
            found = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = zip(old, new, strict=True)
        return None if all(first_difference(*pair) is None for pair in pairs) else (name, old, new)
    if isinstance(old, float) and isinstance(new, float) and abs(old - new) <= TOLERANCE:
        return None
    return None if old == new and type(old) is type(new) else (name, old, new)
