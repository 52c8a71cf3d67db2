"""Reading a configuration: what is needed, what is supported, which id is the mask."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from unmask.layouts.stored import Stored
from unmask.pickles import CheckpointError

MASK_KEYS = "mask_id", "mask_token_id", "mask_index"
MASK_TOKENS = ("[MASK]", "<mask>", "<MASK>", "<|mask|>", "<|MASK|>", "<|mdm_mask|>")


def get(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def need(stored: Stored, *keys: str) -> list[Any]:
    """The values of these keys, integers but for kinds of things."""
    values = [get(stored.config, key) for key in keys]
    missing = [key for key, value in zip(keys, values, strict=True) if value is None]
    if missing:
        raise CheckpointError(f"{stored.path}: the configuration lacks {', '.join(missing)}")
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, int) and key.split(".")[-1] not in ("type", "parameterization"):
            raise CheckpointError(f"{stored.path}: {key} in the configuration must be an integer, got {value!r}")
    return values


def number(stored: Stored, key: str, default: float) -> float:
    value = stored.config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise CheckpointError(f"{stored.path}: {key} in the configuration must be a number, got {value!r}")
    return default if value is None else float(value)


def must(stored: Stored, key: str, got: Any, *supported: Any) -> None:
    if got not in supported:
        raise CheckpointError(f"{stored.path}: {key} must be one of {', '.join(map(str, supported))}; got {got!r}")


def mask_id(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> int | None:
    """That of the configuration, else the tokenizer's mask token."""
    for key in MASK_KEYS:
        if isinstance(config.get(key), int):
            return config[key]
    ids = () if tokenizer is None else (tokenizer.token_to_id(token) for token in MASK_TOKENS)
    return next((i for i in ids if i is not None), None)


def need_mask_id(stored: Stored, tokenizer: Tokenizer | None, vocab_size: int) -> int:
    found = mask_id(stored.config, tokenizer)
    if found is None:
        raise CheckpointError(
            f"{stored.path}: no mask id: the configuration has no mask_token_id, the tokenizer none of "
            f"{', '.join(MASK_TOKENS)}; give the id that stands for masked tokens as mask_id=, below {vocab_size}, or "
            "write it into the configuration (unmask convert --mask-id, or --add-mask)"
        )
    return found


def size(stored: Stored, *names: str) -> int | None:
    """The leading size of the first of these tensors that there is."""
    return next((stored.tensors[n].shape[0] for n in names if n in stored.tensors and stored.tensors[n].ndim), None)
