"""The tensors of a folder, in one file or many, read when they are asked for and written a shard at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from unmask.pickles import CheckpointError, read_pickle

# A model in one file, or an index of its shards; whichever comes first is read.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Shards(Mapping[str, Tensor]):
    """Tensors by name, each read from its file at every access: none is kept. Iterates file by file.

    files: which file holds each tensor. What it gives are pages of the file until they are copied, so a model that is
    placed tensor by tensor needs the memory of one tensor beside its own.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = {name: files[name] for name in sorted(files, key=lambda name: (files[name], name))}
        self._pickle: tuple[Path | None, Mapping[str, Tensor]] = None, {}

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        if file.suffix != ".safetensors":
            if self._pickle[0] != file:
                self._pickle = file, read_pickle(file)
            return self._pickle[1][name]
        with _opened(file) as opened:
            return opened.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class Renamed(Mapping[str, Tensor]):
    """Some tensors of another mapping under names of their own. names: own name -> name there."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_shards(folder: Path) -> Shards:
    """The tensors of a model's folder. Raises `CheckpointError`."""
    found = next((folder / name for name in FILES if (folder / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{folder}: there is no {', no '.join(FILES[:-1])} and no {FILES[-1]}")
    if found.suffix != ".json":
        return Shards(dict.fromkeys(_names(found), found))
    places = _weight_map(found)
    absent = sorted({file.name for file in places.values() if not file.is_file()})
    if absent:
        raise CheckpointError(f"{found}: names shards that are not there: {', '.join(absent)}")
    held = {file: _names(file) for file in set(places.values())}
    astray = sorted(name for name, file in places.items() if name not in held[file])
    if astray:
        raise CheckpointError(f"{found}: names tensors that their shards do not hold: {', '.join(astray)}")
    return Shards(places)


def write_shards(
    folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], Tensor], max_bytes: int = 4 << 30
) -> str:
    """Write tensors to safetensors files of at most `max_bytes`, or of one tensor, with an index if they are many.

    sizes: the bytes of each, by name. tensor: makes one, when its shard's turn comes. Returns the name of the file that
    makes the others a model: the index, or the only file.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        _write_shard(folder / FILES[0], shards[0], tensor)
        return FILES[0]
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, names, tensor)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    (folder / FILES[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return FILES[1]


def _write_shard(file: Path, names: list[str], tensor: Callable[[str], Tensor]) -> None:
    save_file({name: tensor(name).contiguous() for name in names}, file, metadata={"format": "pt"})


def _weight_map(index: Path) -> dict[str, Path]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # A shard lies beside its index.
        if any(Path(file).name != file for file in places.values()):
            raise ValueError("a shard must be a file in the same folder")
        return {name: index.parent / file for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: must hold a weight_map of tensor names to files: {error}") from error


def _names(file: Path) -> set[str]:
    if file.suffix != ".safetensors":
        return {name for name, tensor in read_pickle(file).items() if isinstance(tensor, Tensor)}
    with _opened(file) as opened:
        return set(opened.keys())


def _opened(file: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated, or not a safetensors file: {error}") from error
