"""The `unmask profile` command."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unmask.files import check_file, replace_whole
from unmask.options import AsJson, Device, Dtype, Model, Temperature, Threads, TokenizerFile
from unmask.profile.profile import profile, warm_up
from unmask.profile.trace import write_trace
from unmask.profile.view import show
from unmask.progress import Progress
from unmask.request import (
    BeginSuppress,
    CachingText,
    Guidance,
    Length,
    MaxBatch,
    NumSamples,
    PromptText,
    RevealText,
    ScheduleText,
    Seed,
    SuffixText,
    Suppress,
    TopK,
    TopP,
    load_sampler,
    token_choice,
)

EXAMPLE = "Example:  unmask profile -n 16 --out run.json --trace trace.json"
INTERRUPTED = 130  # exit status


def profile_command(
    model: Model = None,
    schedule: ScheduleText = None,
    reveal: RevealText = "ancestral:256",
    num_samples: NumSamples = 8,
    length: Length = None,
    seed: Seed = 0,
    prompt: PromptText = None,
    suffix: SuffixText = None,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    suppress: Suppress = None,
    begin_suppress: BeginSuppress = None,
    guidance: Guidance = 0.0,
    caching: CachingText = None,
    tokenizer: TokenizerFile = None,
    max_batch: MaxBatch = 16,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="On a GPU: replay ticks as CUDA graphs, as unmask sample does.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write all of it to this JSON file.")] = None,
    texts: Annotated[int, typer.Option(help="Samples that the JSON keeps, the first ones.")] = 4,
    trace: Annotated[
        Path | None,
        typer.Option(help="Run once more under torch.profiler and write its trace here, to open in Perfetto."),
    ] = None,
    trace_ticks: Annotated[int, typer.Option(help="The trace ends after so many network calls.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Sample once and tell where the time and the memory went: by phase, model, block and network call.

    The samples are those of unmask sample with the same options. A few network calls come before, to warm up; after it, a large product tells what rate this machine reaches.
    """  # noqa: E501
    for name, path in (("out", out), ("trace", trace)):
        if path is not None:
            check_file(name, path)
    for name, value, least in (("texts", texts, 0), ("trace-ticks", trace_ticks, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    choose = token_choice(temperature, top_k, top_p, suppress, begin_suppress)
    sampler = load_sampler(
        model, schedule, reveal, choose, max_batch, dtype, device, threads, tokenizer, guidance, caching
    )
    sampler.graphs = None if graphs else False
    request = {"num_samples": num_samples, "length": length, "seed": seed, "prompt": prompt, "suffix": suffix}
    warm_up(sampler, request)
    found = profile(sampler, request, view=Progress.on_stderr())
    content = {**found.to_json(texts), "command": ["unmask", *sys.argv[1:]]}
    if out is not None:
        replace_whole(out, lambda file: file.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8"))
    if as_json:
        print(json.dumps(content))
    else:
        show(found, Console())
    if found.partial:
        raise typer.Exit(INTERRUPTED)
    if trace is not None:
        traced = write_trace(sampler, trace, trace_ticks, request)
        print(f"{trace}: {traced} of {found.stats.num_ticks} ticks, open it in ui.perfetto.dev", file=sys.stderr)
