"""Pickled checkpoints, read without running anything they name.

`torch.load(weights_only=True)` refuses every class it does not know. Training checkpoints also hold configuration
objects of omegaconf and the like: inert placeholders take their names here, so nothing of these libraries is imported.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or understood. The message names the file and what would be right."""


class _Inert:
    """Stands in for an object of a library that is not needed: keeps its state, does nothing."""

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any):
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


# Names that may occur beside the tensors of a training checkpoint. They are never imported, only stood in for.
_HARMLESS = re.compile(
    r"(omegaconf|transformers|tokenizers|lightning|lightning_fabric|pytorch_lightning|torchmetrics|typing|pathlib)\..+"
    r"|collections\.defaultdict|builtins\.(dict|list|tuple|str|int|float|bool|object)"
)


def read_pickle(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: truncated, or not written by torch.save in its zip format")
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        refused = [name for name in names if not _HARMLESS.fullmatch(name)]
        if refused:
            raise CheckpointError(f"{path}: refused, as unpickling it could run code: it names {', '.join(refused)}")
        inert: list[Callable | tuple[Callable, str]] = [(type("Inert", (_Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can make the reader stumble in any way
        raise CheckpointError(f"{path}: truncated, or not a plain checkpoint: {error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must hold a dictionary, got {type(content).__name__}")
    return dict(content)


def plain(node: Any) -> Any:
    """Dictionaries, lists and values out of inert omegaconf nodes, which keep them in `_content` and `_val`."""
    if isinstance(node, _Inert) and isinstance(node.state, dict):
        return plain(node.state.get("_content", node.state.get("_val")))
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return node
