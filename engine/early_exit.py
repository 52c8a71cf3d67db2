"""Early exits: light models that are a heavy one left after some of its blocks, with a norm and a head of their own.

An early exit's folder holds these few tensors and says whose blocks they read. Its denoiser shares the weights of the
blocks with the heavy one in memory when both are loaded together (`unmask.load_all`): models are swapped by depth.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.pickles import CheckpointError

MODEL_TYPE = "unmask-exit"
OWN = ("output_layer.norm_final.weight", "output_layer.linear.weight", "output_layer.linear.bias")
WEIGHTS = "model.safetensors"


def describe(
    body: str | os.PathLike[str], body_folder: Path, folder: Path, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration of an early exit in `folder`: its own sizes, and where its body is and which weights it has.

    body: as given, a bundled name or hub id; a path is stored relative to `folder`, so that both can be moved together.
    """
    local = Path(body).exists() and Path(body).resolve() == body_folder.resolve()
    where = os.path.relpath(body_folder.resolve(), folder.resolve()) if local else os.fspath(body)
    return {**config, "model_type": MODEL_TYPE, "body": where, "body_sha256": digest(body_folder)}


def body_of(folder: Path, config: Mapping[str, Any]) -> str:
    """Where the body of the early exit in `folder` is: a path, or a name."""
    body = config.get("body")
    if not isinstance(body, str):
        raise CheckpointError(f"{folder}: body must name the checkpoint whose blocks are read, got {body!r}")
    beside = folder / body
    return os.fspath(beside) if beside.exists() else body


def merge(
    folder: Path, config: Mapping[str, Any], own: Mapping[str, Tensor], body_folder: Path, body: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a whole model of family "unmask": the body's first blocks and what is its own."""
    found, wanted = digest(body_folder), config.get("body_sha256")
    if found != wanted:
        raise CheckpointError(
            f"{folder}: belongs to a body with {WEIGHTS} of sha256 {wanted!r}, got {body_folder} with {found!r}"
        )
    num_blocks = config.get("n_blocks")
    if not isinstance(num_blocks, int):
        raise CheckpointError(f"{folder}: n_blocks must be the number of blocks that are read, got {num_blocks!r}")
    prefixes = "vocab_embed.embedding", *(f"blocks.{index}." for index in range(num_blocks))
    shared = {name: tensor for name, tensor in body.items() if name.startswith(prefixes)}
    return {**config, "model_type": "unmask", "tie_word_embeddings": False}, {**shared, **own}


def is_exit(folder: Path) -> bool:
    """Whether a folder holds an early exit."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def digest(folder: Path) -> str:
    """sha256 of a folder's weights."""
    try:
        with (folder / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{folder}: the body of an early exit must be a folder with {WEIGHTS}") from error
