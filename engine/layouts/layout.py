"""A family's layout: what its checkpoints hold, and the trunk that they become."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from unmask.denoiser import Denoiser
from unmask.layouts.stored import Stored


@dataclass(frozen=True)
class Layout:
    """One checkpoint, described by its configuration.

    spec: the fields of a `DenoiserSpec` but tokenizer and num_parameters. shapes: of every parameter, by the names that
    the trunk reads. names: what the checkpoint calls those it calls otherwise. unused: shapes of tensors that it may
    hold beside them; None: of any shape. trunk, options: makes the denoiser; its BLOCKS is what the names of all blocks
    begin with, its VOCABULARY the names of what has a row for each id.
    """

    spec: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    trunk: type[Denoiser]
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)

    @property
    def stored_names(self) -> dict[str, str]:
        """The name in the checkpoint of every parameter."""
        return {name: self.names.get(name, name) for name in self.shapes}


class Family(NamedTuple):
    """Who describes a checkpoint. title: for errors; a checkpoint is one of the family if its configuration has one of
    `model_types`, or any if there are none and it has the key that `keys` begin with. keys, tensors: what each must
    have: entries of its configuration, and one tensor, under any of these names."""

    title: str
    model_types: tuple[str, ...]
    keys: tuple[str, ...]
    tensors: tuple[str, ...]
    describe: Callable[[Stored, Tokenizer | None], Layout]
