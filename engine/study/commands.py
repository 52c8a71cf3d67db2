"""What the commands of `unmask study` share: texts, scorers, folders and progress."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer

from unmask.denoiser import Denoiser
from unmask.dtype import parse as parse_dtype
from unmask.info import environment
from unmask.study.quality import TextScorer
from unmask.study.scorer import TRIGRAM, TrigramScorer, load_scorer, locate
from unmask.training.baselines import Trigram
from unmask.training.corpus import Stream, read_documents, split

BATCH = 16
SCHEMA = 1  # of result files
WIDTH = 200  # of tables where there is no terminal, which would count as 80 columns wide and cut them
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
ScorerDtype = Annotated[
    str, typer.Option(help="float32 or bfloat16, for a language model that reads; not for trigram.")
]


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


def check_scorer(scorer: str, data: str, dtype: str) -> torch.dtype:
    """Refuses what cannot be loaded, before anything is; gives the scorer's dtype."""
    chosen = parse_dtype(dtype)
    if chosen is None:
        raise ValueError(f"scorer-dtype must be float32 or bfloat16, got {dtype!r}")
    if scorer == TRIGRAM and data == "none":
        raise ValueError("scorer 'trigram' needs text to learn from, got --data none")
    if scorer not in ("none", TRIGRAM):
        locate(scorer)
    return chosen


def load_reader(
    scorer: str, data: str, share: float, models: dict[str, Denoiser], dtype: torch.dtype
) -> TextScorer | None:
    """The scorer that is meant; a trigram learns from what training saw of the data."""
    if scorer == "none":
        return None
    if scorer != TRIGRAM:
        return load_scorer(scorer, dtype)
    tokenizer = tokenizer_of(models)
    if tokenizer is None:
        raise ValueError("model must bring a tokenizer for the scorer 'trigram' to read text, got none with one")
    train, _ = split(read_documents(data), share)
    ids, vocab_size = Stream.encode(train, tokenizer).ids, next(iter(models.values())).spec.vocab_size
    return TrigramScorer(Trigram.fit(ids, vocab_size), len(ids))


@contextmanager
def phases() -> Iterator[Callable[[str, int, int], object]]:
    """A bar for each phase of the work, or lines where there is no terminal; gives the function that takes (phase,
    done, total)."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    tasks = {}
    with bars() as bar:

        def follow(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield follow


def _lines() -> Callable[[str, int, int], object]:
    """A line when a phase is done, and in between not more often than every ten seconds."""
    last = time.perf_counter()

    def follow(phase: str, done: int, total: int) -> None:
        nonlocal last
        if done < total and time.perf_counter() - last < LINE_SECONDS:
            return
        last = time.perf_counter()
        say(f"{phase}: {done:,}/{total:,}")

    return follow


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def result(kind: str, models: dict[str, Denoiser], content: dict) -> dict:
    """A result file: what it is and where it was measured, before the content."""
    device = next(iter(models.values())).device
    return {"kind": kind, "schema": SCHEMA, "partial": False, **environment(device), **content}


def show(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    console.print(table)
