"""Checkpoints made of others: causal models as the start of masked denoisers, and other dtypes."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    found = examine(replace(stored, config=config), tokenizer, None, given)
    spec = found.spec
    if add_mask:
        spec = replace(spec, vocab_size=spec.vocab_size + 1, mask_id=spec.vocab_size)
        config |= {"vocab_size": spec.vocab_size, "mask_token_id": spec.mask_id}
        tokenizer = _with_mask(tokenizer, spec.mask_id)
    if dtype is not None:
        config |= {key: short(dtype) for key in ("dtype", "torch_dtype") if key in config}
    made = _Made(found, add_mask, dtype, _published(stored, found))
    _write(out, config, tokenizer, made, max_bytes)
    return {
        "out": str(out),
        "family": spec.family,
        "vocab_size": spec.vocab_size,
        "mask_id": spec.mask_id,
        "shift": spec.shift,
        "num_parameters": sum(math.prod(made.shape(name)) for name in made.names),
        "dtype": None if dtype is None else short(dtype),
        "files": sorted(file.name for file in out.iterdir()),
    }


@dataclass(frozen=True)
class _Made:
    """The tensors of the result, each made when it is asked for. names: its name in the result -> the trunk's."""

    found: Checkpoint
    add_mask: bool
    dtype: torch.dtype | None
    names: Mapping[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        rows, *others = self._stored(name).shape
        return rows + self._grows(name), *others

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self._dtype(name).itemsize

    def tensor(self, name: str) -> Tensor:
        tensor = self._stored(name)
        if self._grows(name):
            tensor = torch.cat([tensor, tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)])
        return tensor.to(self._dtype(name))

    def _stored(self, name: str) -> Tensor:
        return self.found.parameters[self.names[name]]

    def _grows(self, name: str) -> bool:
        return self.add_mask and self.names[name] in self.found.trunk.VOCABULARY

    def _dtype(self, name: str) -> torch.dtype:
        stored = self._stored(name)
        return stored.dtype if self.dtype is None or stored.ndim == 1 else self.dtype


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


def _with_mask(tokenizer: Tokenizer | None, mask_id: int) -> Tokenizer | None:
    """With the mask token, where it gets this id: not if the model has more ids than the tokenizer."""
    if tokenizer is not None and tokenizer.get_vocab_size() == mask_id:
        tokenizer.add_special_tokens([MASK_TOKEN])
    return tokenizer


def _published(stored: Stored, found: Checkpoint) -> dict[str, str]:
    """What the source calls each parameter -> what the trunk does."""
    outer: Mapping[str, str] = stored.tensors.names if isinstance(stored.tensors, Renamed) else {}
    return {outer.get(own, own): name for name, own in found.parameters.names.items()}


def _write(out: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None, made: _Made, max_bytes: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        sizes = {name: made.nbytes(name) for name in made.names}
        publish(folder, out, last=write_shards(folder, sizes, made.tensor, max_bytes))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
