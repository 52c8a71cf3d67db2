"""What the commands of `unmask study` share: texts, folders and bars."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from unmask.denoiser import Denoiser
from unmask.training.corpus import Stream, read_documents, split

BATCH = 16


def longest(models: dict[str, Denoiser]) -> int:
    return min(model.spec.max_length for model in models.values())


def tokenizer_of(models: dict[str, Denoiser]) -> Tokenizer | None:
    return next((model.tokenizer for model in models.values() if model.tokenizer is not None), None)


def heldout_windows(data: str, share: float, tokenizer: Tokenizer | None, length: int, most: int | None) -> np.ndarray:
    """int64 [W, length] of the documents that training holds out, evenly spread over them."""
    if tokenizer is None:
        raise ValueError("model must bring a tokenizer to read text, got none with one")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if most is not None and most < 1:
        raise ValueError(f"windows must be at least 1, got {most}")
    _, heldout = split(read_documents(data), share)
    every = Stream.encode(heldout, tokenizer).windows(length)
    if most is None or most >= len(every):
        return every
    return every[np.arange(most) * len(every) // most]


def check_folder(out: Path) -> None:
    if (out.exists() and not out.is_dir()) or not out.parent.is_dir():
        raise ValueError(f"out must be a folder, or a new one in a folder that exists, got {str(out)!r}")


@contextmanager
def counted(total: int) -> Iterator[Callable[[], object]]:
    """A bar of batches; gives the function that advances it."""
    with bars() as bar:
        task = bar.add_task("comparing", total=total)
        yield lambda: bar.advance(task)


def bars() -> Progress:
    """Bars with the time left on a terminal, nothing elsewhere."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
