"""Read and write checkpoints. How they are laid out: `unmask.layouts`."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from unmask import early_exit
from unmask.denoiser import Batch, Denoiser, DenoiserSpec, fingerprint
from unmask.dtype import DTYPES, Choice, faster, parse
from unmask.files import publish
from unmask.layouts import Stored, check, describe, read_files, read_json
from unmask.models.dit import DiT
from unmask.pickles import CheckpointError
from unmask.places import locate
from unmask.shards import Renamed
from unmask.workspace import Workspace

BLOCK_TOKENS, BLOCK_FLOPS = 1024, 20 * 10**9  # of the call that is timed to choose a dtype


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, checked and described: everything that makes a denoiser but dtype and device.

    parameters: by the names that the trunk reads, as stored; from files they are read at every access. trunk, options:
    makes the denoiser.
    """

    spec: DenoiserSpec
    parameters: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    name: str
    trunk: type[Denoiser] = DiT
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of the parameters."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.parameters.items()):
            found.update(f"{name} {list(tensor.shape)}".encode())
            found.update(tensor.float().contiguous().numpy().tobytes())
        return found.hexdigest()


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    name: str | None = None,
    mask_id: int | None = None,
) -> Denoiser:
    """A denoiser from a bundled name, a folder, a .ckpt / .pth file or a hub id, in this order.

    `dtype` is that of weight matrices and activations: fp32, bf16, or "auto", whichever is faster on this machine (see
    `faster_dtype`; the denoiser's `dtype` tells which). Where exactness is claimed take fp32: bf16 rounds the logits,
    and what "auto" chooses another machine may not. `tokenizer` replaces the checkpoint's own tokenizer.json; MDLM and
    SEDD checkpoints bring none, and without one the denoiser works on token ids only. The mask id is that of the
    configuration, else the tokenizer's mask token, else, for MDLM, V - 1; `mask_id` overrides it. Weights are read
    tensor by tensor, so that loading takes the memory of the model and of about one layer. Raises
    `CheckpointError`; ValueError for another dtype.
    """
    return _make(read(source, tokenizer, name, mask_id=mask_id), dtype, device)


def build(
    stored: Stored,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    name: str | None = None,
    mask_id: int | None = None,
    share: bool = False,
) -> Denoiser:
    """A denoiser from tensors and configuration that are in memory already: what `load` does once files are read.

    Arguments and errors are those of `load`; `stored.path` names the model in errors and need not exist. share: tensors
    that have their dtype and device already are used as they are, not copied; they must not change then. On a CPU most
    products have a layout of their own and are copied all the same.
    """
    return _make(examine(stored, open_tokenizer(tokenizer), name, mask_id), dtype, device, share)


def _make(found: Checkpoint, dtype: torch.dtype | str, device: torch.device | str, share: bool = False) -> Denoiser:
    return found.trunk(
        found.spec,
        found.parameters,
        **found.options,
        dtype=parse(dtype) or _time_block(found, device).dtype,
        device=device,
        tokenizer=found.tokenizer,
        name=found.name,
        share=share,
    )


def load_all(
    sources: Mapping[str, str | os.PathLike[str]],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
) -> dict[str, Denoiser]:
    """The denoisers of one run by name, arguments as of `load`; "auto" is one dtype for all (`faster_dtype`).

    An early exit whose body is among them shares the body's weights. On a CPU, where weights are laid out for the
    product that reads them, it has a copy of one matrix: queries, keys and values of its last block.
    """
    dtype = parse(dtype) or faster_dtype(sources.values(), device=device).dtype
    folders = {name: locate(source) for name, source in sources.items()}
    bodies = {name: folder for name, folder in folders.items() if not early_exit.is_exit(folder)}
    options = {"dtype": dtype, "device": device, "tokenizer": tokenizer}
    models = {name: load(sources[name], **options) for name in bodies}
    for name in folders.keys() - bodies.keys():
        body = _body(folders[name], read_json(folders[name] / "config.json"))
        owner = next((models[one] for one, folder in bodies.items() if folder.resolve() == body.resolve()), None)
        if owner is None:
            models[name] = load(sources[name], **options)
        else:
            found = read(sources[name], tokenizer)
            models[name] = owner.leave(found.spec, found.parameters, tokenizer=found.tokenizer, name=found.name)
    return {name: models[name] for name in sources}


def faster_dtype(sources: Iterable[str | os.PathLike[str]], *, device: torch.device | str = "cpu") -> Choice:
    """One dtype for models that run together: the one in which the largest of them (by parameters) is faster here.

    A block of it is timed in both, on about a thousand tokens, within about a second.
    """
    found = [read(source) for source in sources]
    return _time_block(max(found, key=lambda one: one.spec.num_parameters), device)


def _time_block(found: Checkpoint, device: torch.device | str) -> Choice:
    return faster({dtype: _block_call(found, dtype, device) for dtype in DTYPES}, device=device)


def _block_call(found: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> Callable[[], object]:
    """A call of the model's first block for sequences of equal length and all their positions."""
    first, blocks = f"{found.trunk.BLOCKS}.0.", f"{found.trunk.BLOCKS}."
    names = [name for name in found.parameters if name.startswith(first) or not name.startswith(blocks)]
    # The hidden rows need one token of the vocabulary.
    tensors = {
        name: found.parameters[name][:1] if name in found.trunk.VOCABULARY else found.parameters[name] for name in names
    }
    block = found.trunk(replace(found.spec, num_blocks=1), tensors, **found.options, dtype=dtype, device=device)
    length = min(found.spec.max_length, BLOCK_TOKENS)
    while length > 64 and block.flops(length, length).blocks > BLOCK_FLOPS:
        length //= 2
    lengths = (length,) * min(BLOCK_TOKENS // length, max(1, BLOCK_FLOPS // block.flops(length, length).blocks))
    num = sum(lengths)
    tokens, rows = torch.zeros(num, dtype=torch.int64, device=device), torch.arange(num, device=device)
    batch = Batch(tokens, lengths, rows, lengths, torch.ones(len(lengths), device=device))
    workspace = Workspace([block.buffers(num, num, len(lengths))], block.device)
    return lambda: block.hidden(batch, workspace)


def read(
    source: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    name: str | None = None,
    *,
    mask_id: int | None = None,
) -> Checkpoint:
    """A checkpoint that `load` makes a denoiser of; arguments and errors as there."""
    stored = find(source)
    named = name or stored.config.get("name") or Path(source).resolve().name
    return examine(stored, open_tokenizer(tokenizer, stored.path), named, mask_id)


def find(source: str | os.PathLike[str]) -> Stored:
    """What the files of a checkpoint hold, an early exit's with those of its body."""
    return _whole(read_files(locate(source)))


def examine(stored: Stored, tokenizer: Tokenizer | None, name: str | None, mask_id: int | None) -> Checkpoint:
    """A checkpoint whose configuration and tensors are checked."""
    if mask_id is not None:
        stored = replace(stored, config={**stored.config, "mask_id": mask_id})
    path = stored.path
    layout = describe(stored, tokenizer)
    check(stored, layout)
    family, vocab_size, fixed = (layout.spec[key] for key in ("family", "vocab_size", "mask_id"))
    if mask_id is not None and fixed != mask_id:
        raise CheckpointError(f"{path}: mask_id must be {fixed}, which {family} fixes, got {mask_id}")
    if tokenizer is not None and tokenizer.get_vocab_size() > vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.get_vocab_size()} ids, the model only {vocab_size}"
        )
    try:
        spec = DenoiserSpec(
            tokenizer=None if tokenizer is None else fingerprint(tokenizer),
            num_parameters=sum(map(math.prod, layout.shapes.values())),
            **layout.spec,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    parameters = Renamed(stored.tensors, layout.stored_names)
    return Checkpoint(spec, parameters, tokenizer, name or family, layout.trunk, layout.options)


def save(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint of family "unmask": config.json, model.safetensors and, with a tokenizer, tokenizer.json.

    `config` holds vocab_size, mask_id, hidden_dim, n_blocks, n_heads, mlp_dim, model_length, tie_word_embeddings and
    optionally name; `tensors` is checked against it. Matrices are stored in `dtype`, vectors in fp32. A new folder
    appears complete or not at all; in an existing one each file is replaced atomically, the weights last, and other
    files stay.
    """
    folder = Path(folder)
    config = {"model_type": "unmask", **config}
    stored = Stored(folder, dict(tensors), config)
    check(stored, describe(stored))
    return _write(folder, config, tensors, tokenizer, dtype)


def save_exit(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    body: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an early exit of the checkpoint `body`, as `save` writes a model.

    `config` is that of a model with as many blocks as are read; `tensors` are at least the exit's own norm and head.
    """
    folder, found = Path(folder), locate(body)
    own = {name: tensors[name] for name in early_exit.OWN}
    return _write(folder, early_exit.describe(body, found, folder, config), own, tokenizer, dtype)


def _write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | str | os.PathLike[str] | None,
    dtype: torch.dtype,
) -> Path:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.ndim > 1 else torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    tokenizer = open_tokenizer(tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if tokenizer is not None:
            (made / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(stored, made / "model.safetensors", metadata={"format": "pt"})
        publish(made, folder, last="model.safetensors")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def read_tokenizer(file: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises `CheckpointError`."""
    try:
        return Tokenizer.from_file(os.fspath(file))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file}: not a tokenizer.json: {error}") from error


def _body(folder: Path, config: Mapping[str, Any]) -> Path:
    """Where the body of the early exit in `folder` is."""
    try:
        return locate(early_exit.body_of(folder, config))
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is an early exit of another checkpoint: {error}") from error


def _whole(stored: Stored) -> Stored:
    """An early exit with the blocks of its body; other checkpoints as they are."""
    if stored.config.get("model_type") != early_exit.MODEL_TYPE:
        return stored
    body = read_files(_body(stored.path, stored.config))
    config, tensors = early_exit.merge(stored.path, stored.config, stored.tensors, body.path, body.tensors)
    return Stored(stored.path, tensors, config)


def open_tokenizer(given: Tokenizer | str | os.PathLike[str] | None, path: Path | None = None) -> Tokenizer | None:
    """The given tokenizer, in memory, a file or a folder; else the one beside the weights. Raises `CheckpointError`."""
    if isinstance(given, Tokenizer):
        return given
    if given is None:
        file = path / "tokenizer.json" if path is not None and path.is_dir() else None
        if file is None or not file.exists():
            return None
    else:
        file = Path(given) / "tokenizer.json" if Path(given).is_dir() else Path(given)
    return read_tokenizer(file)
