"""What a checkpoint's files hold, before it is checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.pickles import CheckpointError, plain, read_pickle
from unmask.shards import Renamed, read_shards

ROPE_BUFFER = "rotary_emb.inv_freq"  # published checkpoints hold it beside the parameters; it is computed here


@dataclass(frozen=True)
class Stored:
    """Tensors without the prefix `backbone.`, configuration, origin. `path` names a checkpoint in errors; it need not
    exist."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: dict[str, Any]


def read_files(path: Path) -> Stored:
    if path.is_dir():
        local = path / "checkpoints-meta" / "checkpoint.pth"  # the layout of a SEDD training run
        if not (path / "config.json").exists() and local.exists():
            return _read_training_file(local)
        config = read_json(path / "config.json")
        return Stored(path, strip(read_shards(path)), config)
    if path.suffix in (".ckpt", ".pth", ".pt"):
        return _read_training_file(path)
    raise CheckpointError(f"{path}: a checkpoint is a folder or a .ckpt, .pth or .pt file")


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
    tensors = strip({name: tensor for name, tensor in content[key].items() if isinstance(tensor, Tensor)})
    if content.get("ema"):
        tensors = _averaged(path, tensors, content["ema"])
    config = plain(content.get("hyper_parameters"))
    config = config.get("config", config) if isinstance(config, dict) else None
    return Stored(path, tensors, config or _config_beside(path))


def _averaged(path: Path, tensors: Mapping[str, Tensor], ema: Mapping[str, Any]) -> dict[str, Tensor]:
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


def strip(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the prefix that checkpoints of a whole training module have."""
    return Renamed(tensors, {name.removeprefix("backbone."): name for name in tensors})
