"""The request of a run, as options of the commands that take one."""

from pathlib import Path
from typing import Annotated

import typer

from unmask.choose import Categorical
from unmask.options import load_models, named_sources, set_threads
from unmask.reveal import parse
from unmask.sampler import Sampler

SANDWICH = "light:12.5% heavy:75% light:12.5%"

ScheduleText = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="SEGMENTS",
        help="Which model takes which steps, in steps (light:32 heavy:192 light:32) or percent. "
        f"Default for the bundled pair: {SANDWICH}.",
    ),
]
RevealText = Annotated[
    str,
    typer.Option(
        "--reveal",
        metavar="POLICY",
        help="When positions are revealed: ancestral:STEPS[:linear|cosine|RATE,RATE,...], first-hitting, "
        "fixed:STEPS[:first], left-to-right, right-to-left, order:POSITION,POSITION,..., "
        "remask:STEPS[:cap|rescale|loop[:eta=NUMBER,...]], or any in blocks: blocks:LENGTH:POLICY",
    ),
]
NumSamples = Annotated[int, typer.Option("--num-samples", "-n", help="How many samples.")]
Length = Annotated[int | None, typer.Option(help="Tokens of each sample. Default: the models' maximum.")]
Seed = Annotated[int, typer.Option(help="Unsigned 64-bit seed.")]
PromptText = Annotated[
    str | None,
    typer.Option("--prompt", help="Text at the start; <mask> and <mask:12> leave 1 and 12 tokens to fill in."),
]
SuffixText = Annotated[str | None, typer.Option("--suffix", help="Text at the end.")]
MaxBatch = Annotated[int, typer.Option(help="Sequences of one network call.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the fewest likeliest tokens that hold this share of the probability.")
]


def load_sampler(
    model: list[str] | None,
    schedule: str | None,
    reveal: str,
    choose: Categorical,
    max_batch: int,
    dtype: str,
    device: str,
    threads: int | None,
    tokenizer: Path | None,
) -> Sampler:
    """The sampler that the options ask for; the bundled pair takes its schedule unless another is given."""
    set_threads(threads)
    if schedule is None and not model:
        schedule = SANDWICH
    policy = parse(reveal)
    models = load_models(named_sources(model), dtype, device, tokenizer)
    return Sampler(models, schedule=schedule, reveal=policy, choose=choose, max_batch=max_batch)
