"""Where checkpoints are: bundled with the package, on this machine, on the Hugging Face hub."""

import os
import re
from pathlib import Path

from unmask.pickles import CheckpointError

ASSETS = Path(__file__).parent / "assets"
# What is fetched of a hub folder: pickled weights only if there are no others.
HUB_FILES = "config.json", "tokenizer.json", "model.safetensors*", "model-*-of-*.safetensors"
HUB_PICKLES = "pytorch_model.bin*", "pytorch_model-*-of-*.bin"


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder or file of a bundled name, a path or a hub id, in this order. Raises `CheckpointError`."""
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
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*HUB_FILES, *HUB_PICKLES]))
        return folder
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{hub_id!r} is neither a folder nor a public model on the Hugging Face hub") from error
    except (OSError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{hub_id!r} is not a folder, and it cannot be had from the Hugging Face hub: {error}"
        ) from error
