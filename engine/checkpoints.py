"""Read and write checkpoints, and find out whose they are.

| family   | layout                                                                           | weights     |
|----------|----------------------------------------------------------------------------------|-------------|
| "unmask" | folder written by `save`, or by `save_exit` with that of its body               | as stored   |
| "mdlm"   | hub folder (config.json with model_type "mdlm", tensors `backbone.*`)            | as stored   |
| "mdlm"   | Lightning .ckpt with its hyper-parameters                                        | EMA, if any |
| "sedd"   | hub folder (config.json is the hydra configuration)                              | as stored   |
| "sedd"   | checkpoint.pth with `.hydra/config.yaml` in its folder or above, or that folder  | EMA, if any |

Pickled checkpoints are read with `weights_only=True`. Lightning files also hold configuration objects of omegaconf and
the like: inert placeholders take their names, so nothing of these libraries is imported and nothing is run.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from unmask import early_exit
from unmask.denoiser import Batch, Denoiser, DenoiserSpec, fingerprint
from unmask.dtype import DTYPES, Choice, faster, parse
from unmask.files import publish
from unmask.models.dit import DiT, Shape, tensor_shapes
from unmask.pickles import CheckpointError, plain, read_pickle
from unmask.workspace import Workspace

ASSETS = Path(__file__).parent / "assets"
HUB_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json")
ROPE_BUFFER = "rotary_emb.inv_freq"  # published checkpoints hold it beside the parameters; it is computed here
BLOCK_TOKENS, BLOCK_FLOPS = 1024, 20 * 10**9  # of the call that is timed to choose a dtype
MASK_TOKENS = ("[MASK]", "<mask>", "<|mask|>")
# Tokenizers of MDLM's experiments that bring their own mask token; for the others MDLM appends one.
MASK_IDS = {"bert-base-uncased": 103, "text8": 4}


@dataclass(frozen=True)
class _Stored:
    """What a file holds, before it is checked: tensors without the prefix `backbone.`, configuration, origin."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, checked and described: everything that makes a denoiser but dtype and device.

    parameters: by their published names, as stored.
    """

    spec: DenoiserSpec
    parameters: dict[str, Tensor]
    tokenizer: Tokenizer | None
    name: str


def load(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    name: str | None = None,
    body: DiT | None = None,
) -> Denoiser:
    """A denoiser from a bundled name, a folder, a .ckpt / .pth file or a hub id, in this order.

    `dtype` is that of weight matrices and activations: fp32, bf16, or "auto", whichever is faster on this machine (see
    `faster_dtype`; the denoiser's `dtype` tells which). Where exactness is claimed take fp32: bf16 rounds the logits,
    and what "auto" chooses another machine may not. `tokenizer` replaces the checkpoint's own tokenizer.json; MDLM and
    SEDD checkpoints bring none, and without one the denoiser works on token ids only. Their mask id is that of the
    tokenizer's mask token if it has one, else V - 1. `body`: the loaded model whose first blocks an early exit is to
    share (`load_all` finds it). Raises `CheckpointError`; ValueError for another dtype.
    """
    dtype = parse(dtype)
    found = read(source, tokenizer, name)
    if body is not None:
        return body.leave(found.spec, found.parameters, tokenizer=found.tokenizer, name=found.name)
    return DiT(
        found.spec,
        found.parameters,
        dtype=dtype or _time_block(found, device).dtype,
        device=device,
        tokenizer=found.tokenizer,
        name=found.name,
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
    folders = {name: _find(source) for name, source in sources.items()}
    bodies = {name: folder for name, folder in folders.items() if not early_exit.is_exit(folder)}
    options = {"dtype": dtype, "device": device, "tokenizer": tokenizer}
    models = {name: load(sources[name], **options) for name in bodies}
    for name in folders.keys() - bodies.keys():
        body = _find(early_exit.body_of(folders[name], _read_json(folders[name] / "config.json")))
        owner = next((models[one] for one, folder in bodies.items() if folder.resolve() == body.resolve()), None)
        models[name] = load(sources[name], **options, body=owner)
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
    others = re.compile(r"blocks\.(?!0\.)")
    tensors = {name: tensor for name, tensor in found.parameters.items() if not others.match(name)}
    # The hidden rows need one token of the vocabulary.
    vocabulary = "vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"
    tensors |= {name: tensors[name][:1] for name in vocabulary if name in tensors}
    block = DiT(replace(found.spec, num_blocks=1), tensors, dtype=dtype, device=device)
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
) -> Checkpoint:
    """A checkpoint that `load` makes a denoiser of; arguments and errors as there."""
    path = _find(source)
    stored = _whole(_read(path))
    tokenizer = _tokenizer(tokenizer, stored.path)
    family, shape, spec = _describe(stored, tokenizer)
    _check(stored.path, family, stored.tensors, shape, spec["num_heads"])
    if tokenizer is not None and tokenizer.get_vocab_size() > shape.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.get_vocab_size()} ids, the model only {shape.vocab_size}"
        )
    parameters = {key: stored.tensors[key] for key in tensor_shapes(shape)}
    try:
        full = DenoiserSpec(
            family=family,
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_blocks=shape.num_blocks,
            intermediate_size=shape.intermediate_size,
            tokenizer=None if tokenizer is None else fingerprint(tokenizer),
            num_parameters=sum(tensor.numel() for tensor in parameters.values()),
            **spec,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    name = name or stored.config.get("name") or Path(source).resolve().name
    return Checkpoint(full, parameters, tokenizer, name)


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
    shape, spec = _describe_unmask(_Stored(folder, dict(tensors), config))
    _check(folder, "unmask", tensors, shape, spec["num_heads"])
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
    folder, found = Path(folder), _find(body)
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
    tokenizer = _tokenizer(tokenizer, None)
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


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Finding and reading files


def _find(source: str | os.PathLike[str]) -> Path:
    text = os.fspath(source)
    if text in bundled():
        return ASSETS / text
    if Path(text).exists():
        return Path(text)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        return _download(text)
    raise CheckpointError(
        f"no checkpoint {text!r}: it is neither a bundled model ({', '.join(bundled()) or 'there are none'}), nor a "
        "file or folder, nor a hub id like 'kuleshov-group/mdlm-owt'"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import errors, snapshot_download  # half a second, and only needed here

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{hub_id!r} is neither a folder nor a public model on the Hugging Face hub") from error
    except (OSError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{hub_id!r} is not a folder, and it cannot be had from the Hugging Face hub: {error}"
        ) from error


def _read(path: Path) -> _Stored:
    if path.is_dir():
        local = path / "checkpoints-meta" / "checkpoint.pth"  # the layout of a SEDD training run
        if not (path / "config.json").exists() and local.exists():
            return _read_training_file(local)
        return _read_folder(path)
    if path.suffix in (".ckpt", ".pth", ".pt"):
        return _read_training_file(path)
    raise CheckpointError(f"{path}: a checkpoint is a folder or a .ckpt, .pth or .pt file")


def _read_folder(path: Path) -> _Stored:
    config = _read_json(path / "config.json")
    weights, pickled = path / "model.safetensors", path / "pytorch_model.bin"
    if weights.exists():
        try:
            return _Stored(path, _strip(load_file(weights)), config)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{weights}: truncated, or not a safetensors file: {error}") from error
    if pickled.exists():
        return _Stored(path, _strip(read_pickle(pickled)), config)
    raise CheckpointError(f"{path}: there is no {weights.name} and no {pickled.name}")


def _whole(stored: _Stored) -> _Stored:
    """An early exit with the blocks of its body; other checkpoints as they are."""
    if stored.config.get("model_type") != early_exit.MODEL_TYPE:
        return stored
    body = _read(_find(early_exit.body_of(stored.path, stored.config)))
    config, tensors = early_exit.merge(stored.path, stored.config, stored.tensors, body.path, body.tensors)
    return _Stored(stored.path, tensors, config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: there is no {path.name}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(config).__name__}")
    return config


def _read_training_file(path: Path) -> _Stored:
    """A Lightning checkpoint (state_dict, ema, hyper_parameters) or SEDD's (model, ema), with the averaged weights."""
    content = read_pickle(path)
    key = next((key for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), None)
    if key is None:
        raise CheckpointError(f"{path}: must hold 'state_dict' (Lightning) or 'model' (SEDD), got {sorted(content)}")
    tensors = _strip(content[key])
    if content.get("ema"):
        tensors = _averaged(path, tensors, content["ema"])
    config = plain(content.get("hyper_parameters"))
    config = config.get("config", config) if isinstance(config, dict) else None
    return _Stored(path, tensors, config or _config_beside(path))


def _averaged(path: Path, tensors: dict[str, Tensor], ema: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averaged weights are a bare list in the order of `parameters()`: that of the state dict without buffers."""
    names = [name for name in tensors if name != ROPE_BUFFER]
    shadow = ema.get("shadow_params")
    if not isinstance(shadow, list) or len(shadow) != len(names):
        got = f"{len(shadow)} tensors" if isinstance(shadow, list) else type(shadow).__name__
        raise CheckpointError(f"{path}: ema.shadow_params must be a list of {len(names)} tensors, got {got}")
    return dict(zip(names, shadow, strict=True))


def _config_beside(path: Path) -> dict[str, Any]:
    """The configuration of a run, from the checkpoint's folder or the one above."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.json").exists():
            return _read_json(folder / "config.json")
        if (folder / ".hydra" / "config.yaml").exists():
            import yaml  # comes with huggingface_hub, and only needed here

            return yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    raise CheckpointError(f"{path}: holds no configuration, and has no config.json or .hydra/config.yaml beside it")


def _strip(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("backbone."): t for name, t in tensors.items() if isinstance(t, Tensor)}


# ---------------------------------------------------------------------------------------------------------------------
# Families


def _describe(stored: _Stored, tokenizer: Tokenizer | None) -> tuple[str, Shape, dict[str, Any]]:
    """(family, sizes, the other fields of a `DenoiserSpec`)."""
    config = stored.config
    if config.get("model_type") == "unmask":
        return "unmask", *_describe_unmask(stored)
    if config.get("model_type") == "mdlm":
        return "mdlm", *_describe_mdlm(stored, tokenizer)
    if isinstance(config.get("model"), dict):
        family = "sedd" if "graph" in config or config.get("parameterization") == "sedd" else "mdlm"
        return family, *_describe_hydra(stored, tokenizer)
    raise CheckpointError(
        f"{stored.path}: unknown family: model_type must be 'unmask' or 'mdlm', or the configuration must be a hydra "
        f"one with 'model' in it (MDLM, SEDD); got model_type {config.get('model_type')!r} and keys {sorted(config)}"
    )


def _describe_unmask(stored: _Stored) -> tuple[Shape, dict[str, Any]]:
    sizes = ("vocab_size", "hidden_dim", "n_blocks", "mlp_dim", "tie_word_embeddings")
    *sizes, mask_id, num_heads, length = _need(stored, *sizes, "mask_id", "n_heads", "model_length")
    vocab_size, dim, num_blocks, mlp, tied = sizes
    shape = Shape(vocab_size, dim, num_blocks, mlp, tied=bool(tied))
    return shape, {"mask_id": mask_id, "num_heads": num_heads, "max_length": length}


def _describe_mdlm(stored: _Stored, tokenizer: Tokenizer | None) -> tuple[Shape, dict[str, Any]]:
    keys = ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "model_length", "time_conditioning")
    vocab_size, dim, num_blocks, num_heads, length, conditioned = _need(stored, *keys)
    return _published_shape(stored, vocab_size, dim, num_blocks), {
        "mask_id": _mask_id(stored.config, vocab_size, tokenizer),
        "num_heads": num_heads,
        "max_length": length,
        "time_conditioned": bool(conditioned),
    }


def _describe_hydra(stored: _Stored, tokenizer: Tokenizer | None) -> tuple[Shape, dict[str, Any]]:
    """The configuration of a training run: MDLM's code base (which trains SEDD too) or SEDD's own."""
    config = stored.config
    keys = ("model.hidden_size", "model.n_blocks", "model.n_heads", "model.length")
    if "graph" in config:
        *sizes, tokens, graph, noise = _need(stored, *keys, "tokens", "graph.type", "noise.type")
        _must(stored, "graph.type", graph, "absorb")
        vocab_size, conditioned, mask_id = tokens + 1, True, tokens
    else:
        *sizes, conditioned, parameterization = _need(stored, *keys, "time_conditioning", "parameterization")
        _must(stored, "parameterization", parameterization, "subs", "sedd")
        noise = _get(config, "noise.type")
        vocab_size = _size(stored, "vocab_embed.embedding", "output_layer.linear.bias")
        if vocab_size is None:
            raise CheckpointError(f"{stored.path}: missing vocab_embed.embedding and output_layer.linear.bias")
        mask_id = _mask_id(config, vocab_size, tokenizer)
    if conditioned:
        _must(stored, "noise.type", noise, "loglinear")
    dim, num_blocks, num_heads, length = sizes
    spec = {"mask_id": mask_id, "num_heads": num_heads, "max_length": length, "time_conditioned": bool(conditioned)}
    return _published_shape(stored, vocab_size, dim, num_blocks), spec


def _published_shape(stored: _Stored, vocab_size: int, dim: int, num_blocks: int) -> Shape:
    """Sizes that the tensors know best: the default of cond_dim in the published MDLMConfig (129) is not its value."""
    cond_dim = _size(stored, "sigma_map.mlp.2.bias", "sigma_map.mlp.0.weight")
    mlp = _size(stored, "blocks.0.mlp.0.weight", "blocks.0.mlp.0.bias") or 4 * dim
    return Shape(vocab_size, dim, num_blocks, mlp, cond_dim or stored.config.get("cond_dim") or 128)


def _mask_id(config: Mapping[str, Any], vocab_size: int, tokenizer: Tokenizer | None) -> int:
    """As MDLM does: the tokenizer's mask token if it has one, else one id after the last."""
    for key in ("mask_id", "mask_token_id", "mask_index"):
        if isinstance(config.get(key), int):
            return config[key]
    if tokenizer is not None:
        found = [tokenizer.token_to_id(token) for token in MASK_TOKENS]
        return next((i for i in found if i is not None), vocab_size - 1)
    return MASK_IDS.get(_get(config, "data.tokenizer_name_or_path"), vocab_size - 1)


def _size(stored: _Stored, *names: str) -> int | None:
    """The leading size of the first of these tensors that there is."""
    return next((stored.tensors[n].shape[0] for n in names if n in stored.tensors and stored.tensors[n].ndim), None)


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _need(stored: _Stored, *keys: str) -> list[Any]:
    values = [_get(stored.config, key) for key in keys]
    missing = [key for key, value in zip(keys, values, strict=True) if value is None]
    if missing:
        raise CheckpointError(f"{stored.path}: the configuration lacks {', '.join(missing)}")
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, int) and key.split(".")[-1] not in ("type", "parameterization"):
            raise CheckpointError(f"{stored.path}: {key} in the configuration must be an integer, got {value!r}")
    return values


def _must(stored: _Stored, key: str, got: Any, *supported: str) -> None:
    if got not in supported:
        raise CheckpointError(f"{stored.path}: {key} must be one of {', '.join(supported)}; got {got!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Checks and the rest


def _check(path: Path, family: str, tensors: Mapping[str, Tensor], shape: Shape, num_heads: int) -> None:
    """Raise one error that lists every missing, extra and misshapen tensor."""
    if num_heads < 1 or shape.hidden_size % (2 * num_heads):
        raise CheckpointError(
            f"{path}: the hidden size {shape.hidden_size} must be a multiple of twice the number of heads, "
            f"got {num_heads}"
        )
    expected = tensor_shapes(shape)
    known = expected | {ROPE_BUFFER: (shape.hidden_size // num_heads // 2,)}
    faults = [f"missing {name} {list(expected[name])}" for name in sorted(expected.keys() - tensors.keys())]
    faults += [f"extra {name} {list(tensors[name].shape)}" for name in sorted(tensors.keys() - known.keys())]
    faults += [
        f"misshapen {name}: got {list(tensors[name].shape)}, expected {list(known[name])}"
        for name in sorted(tensors.keys() & known.keys())
        if tuple(tensors[name].shape) != known[name]
    ]
    faults += [
        f"not floating point {name}: got {tensors[name].dtype}"
        for name in sorted(tensors.keys() & expected.keys())
        if not tensors[name].is_floating_point()
    ]
    if faults:
        raise CheckpointError(f"{path}: the tensors are not those of this {family} model:\n  " + "\n  ".join(faults))


def _tokenizer(given: Tokenizer | str | os.PathLike[str] | None, path: Path | None) -> Tokenizer | None:
    """The given tokenizer, or the one beside the weights."""
    if isinstance(given, Tokenizer):
        return given
    if given is None:
        file = path / "tokenizer.json" if path is not None and path.is_dir() else None
        if file is None or not file.exists():
            return None
    else:
        file = Path(given) / "tokenizer.json" if Path(given).is_dir() else Path(given)
    return read_tokenizer(file)
