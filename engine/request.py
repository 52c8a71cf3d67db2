"""The request of a run, as options of the commands that take one."""

from pathlib import Path
from typing import Annotated

import typer

from unmask.caching import KINDS, Caching
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
        help="\n\n".join(
            (
                "When positions are revealed. Planned ahead:",
                "ancestral:STEPS[:GRID], GRID linear, cosine or RATE,RATE,...",
                "fixed:STEPS[:first]",
                "first-hitting, left-to-right, right-to-left, order:POSITION,POSITION,...",
                "remask:STEPS[:KIND[:eta=E,...]], KIND cap, rescale or loop",
                "By what the network is sure of:",
                "confidence:SCORE:RULE, SCORE probability, margin, entropy or random, RULE steps=N, per_step=K, "
                "threshold=T or entropy_bound=B",
                "remask:STEPS:conf",
                "Any of them in blocks, those of confidence also up to a token id that stops:",
                "blocks:LENGTH:POLICY, blocks:LENGTH:stop:TOKEN:POLICY",
            )
        ),
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
Suppress = Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Token ids that are never drawn.")]
BeginSuppress = Annotated[
    str | None, typer.Option(metavar="ID,ID,...", help="Token ids that the first masked position does not draw.")
]
Guidance = Annotated[
    float,
    typer.Option(help="Scale of classifier-free guidance by the prompt; above 0 it costs two network calls for one."),
]
CachingText = Annotated[
    str | None,
    typer.Option(
        "--caching",
        metavar="KIND[:N]",
        help="Keep keys and values between the steps of a block: prefix or dual, all computed anew every N steps. "
        "Faster, but not the network's own law. For confidence policies, and models that can.",
    ),
]


def token_choice(
    temperature: float, top_k: int | None, top_p: float | None, suppress: str | None, begin_suppress: str | None
) -> Categorical:
    """The token choice that the options ask for."""
    lists = {"suppress": _ids("suppress", suppress), "begin_suppress": _ids("begin-suppress", begin_suppress)}
    return Categorical(temperature, top_k, top_p, **lists)


def _ids(name: str, text: str | None) -> tuple[int, ...]:
    try:
        return () if text is None else tuple(int(one) for one in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be token ids such as 3,17, got {text!r}") from None


def _caching(text: str | None) -> Caching | None:
    if text is None:
        return None
    kind, colon, refresh = text.partition(":")
    if colon and not refresh.isdecimal():
        raise ValueError(f"caching must be {' or '.join(KINDS)}, or KIND:N such as {KINDS[0]}:8, got {text!r}")
    return Caching(kind, int(refresh) if colon else None)


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
    guidance: float = 0.0,
    caching: str | None = None,
) -> Sampler:
    """The sampler that the options ask for; the bundled pair takes its schedule unless another is given."""
    set_threads(threads)
    if schedule is None and not model:
        schedule = SANDWICH
    options = {"reveal": parse(reveal), "choose": choose, "guidance": guidance, "caching": _caching(caching)}
    models = load_models(named_sources(model), dtype, device, tokenizer)
    return Sampler(models, schedule=schedule, **options, max_batch=max_batch)
