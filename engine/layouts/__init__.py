"""How checkpoints are laid out on disk: reading their files, finding out whose they are, checking their tensors.

| family                             | layout                                                           | weights     |
|------------------------------------|------------------------------------------------------------------|-------------|
| "unmask"                           | folder written by `save`, or by `save_exit` with its body's      | as stored   |
| "mdlm"                             | hub folder (model_type "mdlm", tensors `backbone.*`)             | as stored   |
| "mdlm"                             | Lightning .ckpt with its hyper-parameters                        | EMA, if any |
| "sedd"                             | hub folder (config.json is the hydra configuration)              | as stored   |
| "sedd"                             | checkpoint.pth with `.hydra/config.yaml` beside or above it      | EMA, if any |
| "llada", "dream", "sdar", "llama", | hub folder, in one file or in shards; see `llama`                | as stored   |
| "qwen2", "qwen3"                   |                                                                  |             |
| "gpt2", "diffugpt"                 | hub folder, in one file or in shards; see `gpt2`                 | as stored   |

Pickled checkpoints are read with `weights_only=True`. Lightning files also hold configuration objects of omegaconf and
the like: inert placeholders take their names, so nothing of these libraries is imported and nothing is run.
"""

import torch
from tokenizers import Tokenizer

from unmask.layouts import dit, gpt2, llama
from unmask.layouts.fields import get
from unmask.layouts.layout import Family, Layout
from unmask.layouts.stored import Stored, read_files, read_json, strip
from unmask.pickles import CheckpointError

__all__ = ["FAMILIES", "Layout", "Stored", "check", "describe", "read_files", "read_json", "strip"]

FAMILIES: tuple[Family, ...] = (*dit.FAMILIES, *llama.FAMILIES, *gpt2.FAMILIES)
STORED_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def describe(stored: Stored, tokenizer: Tokenizer | None = None) -> Layout:
    """The layout of a checkpoint by its configuration. Raises `CheckpointError`."""
    kind = stored.config.get("model_type")
    found = next((family for family in FAMILIES if kind in family.model_types), None)
    if found is None and isinstance(stored.config.get("model"), dict):
        found = next(family for family in FAMILIES if not family.model_types)
    if found is None:
        raise CheckpointError(_unknown(stored))
    if stored.config.get("quantization_config"):
        raise CheckpointError(f"{stored.path}: the weights must not be quantised, got a quantization_config")
    return found.describe(stored, tokenizer)


def _unknown(stored: Stored) -> str:
    """Which families are known, and what this checkpoint lacks of each."""
    lines = []
    for family in FAMILIES:
        types = " or ".join(map(repr, family.model_types))
        lacking = [f"model_type {types}"] if types else []
        lacking += [key for key in family.keys if get(stored.config, key) is None]
        if not any(name in stored.tensors for name in family.tensors):
            lacking.append(f"a tensor {' or '.join(family.tensors)}")
        lines.append(f"\n  {family.title}: {', '.join(lacking)}")
    kind = stored.config.get("model_type")
    return f"{stored.path}: unknown family, model_type {kind!r}. It lacks of the known ones:{''.join(lines)}"


def check(stored: Stored, layout: Layout) -> None:
    """Raise one error that lists every missing, extra and misshapen tensor."""
    expected = {layout.stored_names[name]: shape for name, shape in layout.shapes.items()}
    known = {**layout.unused, **expected}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.tensors.items()}
    faults = [f"missing {name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"extra {name} {list(found[name][0])}" for name in sorted(found.keys() - known.keys())]
    faults += [
        f"misshapen {name}: got {list(found[name][0])}, expected {list(known[name])}"
        for name in sorted(found.keys() & known.keys())
        if known[name] is not None and found[name][0] != known[name]
    ]
    faults += [
        f"not floating point {name}: got {found[name][1]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name][1] not in STORED_DTYPES
    ]
    if faults:
        family = layout.spec["family"]
        raise CheckpointError(
            f"{stored.path}: the tensors are not those of this {family} model:\n  " + "\n  ".join(faults)
        )
