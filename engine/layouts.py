"""How checkpoints are laid out on disk: reading their files, finding out whose they are, checking their tensors.

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from unmask.models.dit import Shape, tensor_shapes
from unmask.pickles import CheckpointError, plain, read_pickle

ROPE_BUFFER = "rotary_emb.inv_freq"  # published checkpoints hold it beside the parameters; it is computed here
MASK_TOKENS = ("[MASK]", "<mask>", "<|mask|>")
# Tokenizers of MDLM's experiments that bring their own mask token; for the others MDLM appends one.
MASK_IDS = {"bert-base-uncased": 103, "text8": 4}


@dataclass(frozen=True)
class Stored:
    """What a file holds, before it is checked: tensors without the prefix `backbone.`, configuration, origin."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def read_files(path: Path) -> Stored:
    if path.is_dir():
        local = path / "checkpoints-meta" / "checkpoint.pth"  # the layout of a SEDD training run
        if not (path / "config.json").exists() and local.exists():
            return _read_training_file(local)
        return _read_folder(path)
    if path.suffix in (".ckpt", ".pth", ".pt"):
        return _read_training_file(path)
    raise CheckpointError(f"{path}: a checkpoint is a folder or a .ckpt, .pth or .pt file")


def _read_folder(path: Path) -> Stored:
    config = read_json(path / "config.json")
    weights, pickled = path / "model.safetensors", path / "pytorch_model.bin"
    if weights.exists():
        try:
            return Stored(path, _strip(load_file(weights)), config)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{weights}: truncated, or not a safetensors file: {error}") from error
    if pickled.exists():
        return Stored(path, _strip(read_pickle(pickled)), config)
    raise CheckpointError(f"{path}: there is no {weights.name} and no {pickled.name}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: there is no {path.name}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(config).__name__}")
    return config


def _read_training_file(path: Path) -> Stored:
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
    return Stored(path, tensors, config or _config_beside(path))


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
            return read_json(folder / "config.json")
        if (folder / ".hydra" / "config.yaml").exists():
            import yaml  # comes with huggingface_hub, and only needed here

            return yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    raise CheckpointError(f"{path}: holds no configuration, and has no config.json or .hydra/config.yaml beside it")


def _strip(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("backbone."): t for name, t in tensors.items() if isinstance(t, Tensor)}


def describe(stored: Stored, tokenizer: Tokenizer | None) -> tuple[str, Shape, dict[str, Any]]:
    """(family, sizes, the other fields of a `DenoiserSpec`)."""
    config = stored.config
    if config.get("model_type") == "unmask":
        return "unmask", *describe_unmask(stored)
    if config.get("model_type") == "mdlm":
        return "mdlm", *_describe_mdlm(stored, tokenizer)
    if isinstance(config.get("model"), dict):
        family = "sedd" if "graph" in config or config.get("parameterization") == "sedd" else "mdlm"
        return family, *_describe_hydra(stored, tokenizer)
    raise CheckpointError(
        f"{stored.path}: unknown family: model_type must be 'unmask' or 'mdlm', or the configuration must be a hydra "
        f"one with 'model' in it (MDLM, SEDD); got model_type {config.get('model_type')!r} and keys {sorted(config)}"
    )


def describe_unmask(stored: Stored) -> tuple[Shape, dict[str, Any]]:
    sizes = ("vocab_size", "hidden_dim", "n_blocks", "mlp_dim", "tie_word_embeddings")
    *sizes, mask_id, num_heads, length = _need(stored, *sizes, "mask_id", "n_heads", "model_length")
    vocab_size, dim, num_blocks, mlp, tied = sizes
    shape = Shape(vocab_size, dim, num_blocks, mlp, tied=bool(tied))
    return shape, {"mask_id": mask_id, "num_heads": num_heads, "max_length": length}


def _describe_mdlm(stored: Stored, tokenizer: Tokenizer | None) -> tuple[Shape, dict[str, Any]]:
    keys = ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "model_length", "time_conditioning")
    vocab_size, dim, num_blocks, num_heads, length, conditioned = _need(stored, *keys)
    return _published_shape(stored, vocab_size, dim, num_blocks), {
        "mask_id": _mask_id(stored.config, vocab_size, tokenizer),
        "num_heads": num_heads,
        "max_length": length,
        "time_conditioned": bool(conditioned),
    }


def _describe_hydra(stored: Stored, tokenizer: Tokenizer | None) -> tuple[Shape, dict[str, Any]]:
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


def _published_shape(stored: Stored, vocab_size: int, dim: int, num_blocks: int) -> Shape:
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


def _size(stored: Stored, *names: str) -> int | None:
    """The leading size of the first of these tensors that there is."""
    return next((stored.tensors[n].shape[0] for n in names if n in stored.tensors and stored.tensors[n].ndim), None)


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _need(stored: Stored, *keys: str) -> list[Any]:
    values = [_get(stored.config, key) for key in keys]
    missing = [key for key, value in zip(keys, values, strict=True) if value is None]
    if missing:
        raise CheckpointError(f"{stored.path}: the configuration lacks {', '.join(missing)}")
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, int) and key.split(".")[-1] not in ("type", "parameterization"):
            raise CheckpointError(f"{stored.path}: {key} in the configuration must be an integer, got {value!r}")
    return values


def _must(stored: Stored, key: str, got: Any, *supported: str) -> None:
    if got not in supported:
        raise CheckpointError(f"{stored.path}: {key} must be one of {', '.join(supported)}; got {got!r}")


def check(path: Path, family: str, tensors: Mapping[str, Tensor], shape: Shape, num_heads: int) -> None:
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
