"""Checkpoints made of others: causal models as the start of masked denoisers, and other dtypes."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from unmask.checkpoints import Checkpoint, examine, find, open_tokenizer
from unmask.dtype import DTYPES, parse, short
from unmask.files import publish
from unmask.layouts import Stored, fields
from unmask.shards import Renamed, write_shards

CAUSAL = "llama", "qwen2", "qwen3", "gpt2"  # model types of causal models whose layout a denoiser shares
MASK_TOKEN = "<mask>"


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mask_id: int | None = None,
    add_mask: bool = False,
    dtype: torch.dtype | str | None = None,
    max_bytes: int = 4 << 30,
) -> dict[str, Any]:
    """Write the checkpoint `source`, as `unmask.load` takes it, to the new folder `out`; returns what is there now.

    A causal checkpoint (Llama, Qwen2, Qwen3, GPT-2) becomes a masked denoiser: its attention sees all, row i - 1
    predicts position i, and it has a mask id, which is `mask_id`, or with `add_mask` a new one after the last, whose
    rows in embedding and head are the mean of the others. That is where adaptation training begins (Gong et al. 2025,
    arXiv 2410.17891), not a trained model. A checkpoint that is a denoiser already keeps its meaning and changes its
    dtype only.

    dtype: of matrices, fp32 or bf16; None leaves each as it is; vectors are left as they are. Files have at most
    `max_bytes`, and are written one after the other. The folder appears complete or not at all. Raises
    `CheckpointError` for a source that cannot be loaded, ValueError for the other arguments.
    """
    out = Path(out)
    if dtype is not None and parse(dtype) is None:
        raise ValueError(f"dtype must be one of {', '.join(map(short, DTYPES))}, got {dtype!r}")
    dtype = None if dtype is None else parse(dtype)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {str(out)!r}")
    if add_mask and mask_id is not None:
        raise ValueError(f"mask_id must be None where a mask id is added, got {mask_id}")
    stored = find(source)
    tokenizer = open_tokenizer(None, stored.path)
    config, given = _configured(stored, tokenizer, mask_id, add_mask)
    found = examine(Stored(stored.path, stored.tensors, config), tokenizer, None, given)
    if add_mask:
        given = found.spec.vocab_size
        config |= {"vocab_size": given + 1, "mask_token_id": given}
        tokenizer = _with_mask(tokenizer, given)
    _write(out, stored, found, config, tokenizer, add_mask, dtype, max_bytes)
    return {
        "out": str(out),
        "family": found.spec.family,
        "vocab_size": found.spec.vocab_size + add_mask,
        "mask_id": found.spec.mask_id if given is None else given,
        "shift": found.spec.shift,
        "num_parameters": found.spec.num_parameters + add_mask * found.spec.hidden_size * len(_vocabulary(found)),
        "dtype": None if dtype is None else short(dtype),
        "files": sorted(file.name for file in out.iterdir()),
    }


def _configured(
    stored: Stored, tokenizer: Tokenizer | None, mask_id: int | None, add_mask: bool
) -> tuple[dict[str, Any], int | None]:
    """The configuration of the result, and the mask id with which the source is examined."""
    config, causal = dict(stored.config), stored.config.get("model_type") in CAUSAL
    known = fields.mask_id(config, tokenizer)
    if add_mask and (known is not None or not causal):
        has = "has none to add to" if known is None else f"has the mask id {known}"
        raise ValueError(f"a mask id can be added to a causal checkpoint without one (--add-mask), {stored.path} {has}")
    if not causal:
        if mask_id is not None:
            config[next((key for key in fields.MASK_KEYS if key in config), "mask_token_id")] = mask_id
        return config, mask_id
    if known is None and mask_id is None and not add_mask:
        raise ValueError(f"{stored.path} has no mask id: name one of its ids (--mask-id) or add one (--add-mask)")
    mask_id = known if mask_id is None else mask_id
    config |= {"shift": config.get("shift", True), "mask_token_id": mask_id}
    return config, 0 if add_mask else mask_id


def _vocabulary(found: Checkpoint) -> list[str]:
    """The parameters that have a row for each id."""
    return [name for name in found.trunk.VOCABULARY if name in found.parameters]


def _with_mask(tokenizer: Tokenizer | None, mask_id: int) -> Tokenizer | None:
    """With the mask token, where it gets this id: not if the model has more ids than the tokenizer."""
    if tokenizer is not None and tokenizer.get_vocab_size() == mask_id:
        tokenizer.add_special_tokens([MASK_TOKEN])
    return tokenizer


def _write(
    out: Path,
    stored: Stored,
    found: Checkpoint,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    add_mask: bool,
    dtype: torch.dtype | None,
    max_bytes: int,
) -> None:
    grown = set(_vocabulary(found)) if add_mask else set()
    names = {_published(stored, found, name): name for name in found.parameters}

    def tensor(published: str) -> Tensor:
        name = names[published]
        made = found.parameters[name]
        if name in grown:
            made = torch.cat([made, made.mean(0, keepdim=True, dtype=torch.float32).to(made.dtype)])
        return made.to(dtype) if dtype is not None and made.ndim > 1 else made

    def size(name: str) -> int:
        stored_now = found.parameters[name]
        kind = dtype if dtype is not None and stored_now.ndim > 1 else stored_now.dtype
        shape = (len(stored_now) + 1, *stored_now.shape[1:]) if name in grown else stored_now.shape
        return math.prod(shape) * kind.itemsize

    sizes = {published: size(name) for published, name in names.items()}
    if dtype is not None:
        config |= {key: short(dtype) for key in ("dtype", "torch_dtype") if key in config}
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if tokenizer is not None:
            (made / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        publish(made, out, last=write_shards(made, sizes, tensor, max_bytes))
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _published(stored: Stored, found: Checkpoint, name: str) -> str:
    """What the source calls a parameter."""
    inner: Mapping[str, str] = stored.tensors.names if isinstance(stored.tensors, Renamed) else {}
    own = found.parameters.names[name]
    return inner.get(own, own)
