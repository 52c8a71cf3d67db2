"""Denoisers of torch modules that are in memory already."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from unmask.checkpoints import build, open_tokenizer
from unmask.denoiser import Denoiser, DenoiserSpec, LogitsDenoiser, fingerprint
from unmask.dtype import DTYPES, parse, short
from unmask.layouts import FAMILIES, Stored, strip
from unmask.layouts.fields import need_mask_id
from unmask.models.masked_lm import MaskedLM, split

MAX_LENGTHS = "max_position_embeddings", "n_positions", "max_sequence_length", "model_length", "max_seq_len"
UNKNOWN_LENGTH = 1 << 20  # of a model that does not say how long a sequence may be

_made: WeakKeyDictionary[nn.Module, dict[tuple, tuple[tuple, Denoiser]]] = WeakKeyDictionary()


def wrap(
    module: nn.Module,
    *,
    tokenizer: Any = None,
    mask_id: int | None = None,
    dtype: torch.dtype | str | None = None,
    name: str | None = None,
) -> Denoiser:
    """A denoiser of a live module, where the module is.

    - A module of a family that `load` reads (its `config.model_type` and tensors: LLaDA, Dream, DiffuLLaMA, MDLM,
      Llama, Qwen, GPT-2, ...) becomes this library's trunk, bidirectional whatever the module's own attention is.
      Weights that have their dtype already are shared; on a CPU most products have a layout of their own, a copy.
    - BERT, RoBERTa and ModernBERT with the head of a masked language model are run as they are up to that head, which
      is computed at the revealed rows only.
    - Anything else is called with tokens int64 [B, L] and must return logits [B, L, V], or have them as `.logits`, row
      i for position i: see `LogitsDenoiser`.

    tokenizer: a `tokenizers.Tokenizer`, a file, or a fast tokenizer of `transformers`. mask_id: None is that of the
    configuration, else of the tokenizer. dtype: of the trunk; None is that of the module. A trunk is kept as long as
    the module, and made anew when a weight has changed since; one made before is of no use then. Raises ValueError
    (`CheckpointError`) for tensors that are not those of the family, a mask id that is nowhere, or a dtype that is not
    that of a module run as it is.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch module, got {type(module).__name__}; unmask.load reads checkpoints")
    tokenizer, own_mask_id = _tokenizer(tokenizer)
    config = module.config.to_dict() if hasattr(getattr(module, "config", None), "to_dict") else {}
    name = name or type(module).__name__
    if mask_id is None and config.get("mask_token_id") is None:
        mask_id = own_mask_id
    if any(config.get("model_type") in family.model_types for family in FAMILIES):
        return _trunk(module, config, tokenizer, mask_id, dtype, name)
    if mask_id is not None:
        config["mask_id"] = mask_id
    own = next((weight.dtype for weight in module.parameters()), None)
    if dtype is not None and parse(dtype) is not own:
        raise ValueError(f"dtype must be None for {name}, which runs as it is, in {own}; got {short(dtype)}")
    if hasattr(module, "config") and module.training:
        raise ValueError(f"{name} must be in evaluation mode, or dropout takes part in what is drawn: call its eval()")
    parts, tokenizer = split(module), open_tokenizer(tokenizer)
    if parts is not None:
        spec = _spec(module, config, tokenizer, *parts.decoder.weight.shape, parts.first_position)
        return MaskedLM(parts, spec, tokenizer=tokenizer, name=name)
    logits, device = _logits_of(module), _device(module)
    with torch.no_grad():
        vocab_size = logits(torch.zeros(1, 1, dtype=torch.int64, device=device)).shape[-1]
    spec = _spec(module, config, tokenizer, vocab_size)
    return LogitsDenoiser(logits, spec, tokenizer=tokenizer, name=name, device=device)


def _trunk(
    module: nn.Module,
    config: dict[str, Any],
    tokenizer: Tokenizer | str | os.PathLike[str] | None,
    mask_id: int | None,
    dtype: torch.dtype | str | None,
    name: str,
) -> Denoiser:
    """This library's trunk with the module's weights."""
    device = _device(module)
    if dtype is None:
        dtype = next((weight.dtype for weight in module.parameters()), torch.float32)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(short, DTYPES))}; {name} has {short(dtype)}")
    # The denoiser keeps its tokenizer, so that no other one has this id.
    key = id(tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer, mask_id, dtype, name, repr(config)
    state, kept = _state_of(module), _made.setdefault(module, {})
    if key not in kept or kept[key][0] != state:
        stored = Stored(Path(name), strip(module.state_dict()), config)
        options = {"dtype": dtype, "device": device, "tokenizer": tokenizer, "mask_id": mask_id}
        for other in [other for other, (earlier, _) in kept.items() if earlier != state]:
            del kept[other]
        kept[key] = state, build(stored, **options, name=name, share=True)
    return kept[key][1]


def _state_of(module: nn.Module) -> tuple:
    """Changes with the weights: where they are, their version counters, and a few numbers of each, as writing through
    `parameter.data`, which is how averaged weights are swapped in, leaves the counters as they are."""
    weights = [weight.detach() for weight in module.parameters() if weight.numel()]
    places = [(weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version) for weight in weights]
    ends = [weight[(place,) * weight.ndim].float() for weight in weights for place in (0, -1)]
    return tuple(places), tuple(torch.stack(ends).tolist()) if ends else ()


def _device(module: nn.Module) -> torch.device:
    devices = {weight.device for weight in module.parameters()} or {torch.device("cpu")}
    if len(devices) > 1:
        raise ValueError(f"module must live on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop()


def _logits_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def logits(tokens: Tensor) -> Tensor:
        output = module(tokens)
        found = getattr(output, "logits", output)
        if not isinstance(found, Tensor):
            raise TypeError(f"{type(module).__name__} must return logits or have them as .logits, got {type(output)}")
        return found

    return logits


def _spec(
    module: nn.Module,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    hidden_size: int = 1,
    first_position: int = 0,
) -> DenoiserSpec:
    """Of a module that is run as it is."""
    length = next((config[key] for key in MAX_LENGTHS if isinstance(config.get(key), int)), UNKNOWN_LENGTH)
    return DenoiserSpec(
        config.get("model_type") or "logits",
        vocab_size,
        need_mask_id(Stored(Path(type(module).__name__), {}, config), tokenizer, vocab_size),
        hidden_size,
        num_blocks=config.get("num_hidden_layers") or 0,
        num_heads=1,
        intermediate_size=config.get("intermediate_size") or 0,
        max_length=length - first_position,
        tokenizer=None if tokenizer is None else fingerprint(tokenizer),
        num_parameters=sum(weight.numel() for weight in module.parameters()),
    )


def _tokenizer(given: Any) -> tuple[Tokenizer | str | os.PathLike[str] | None, int | None]:
    """A tokenizer or where it is stored, and its mask id where it says so itself."""
    if given is None or isinstance(given, (Tokenizer, str, os.PathLike)):
        return given, None
    backend = getattr(given, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            "tokenizer must be a tokenizers.Tokenizer, a file, or a fast tokenizer of transformers, "
            f"got {type(given).__name__}"
        )
    return backend, getattr(given, "mask_token_id", None)
