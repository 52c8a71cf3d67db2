"""Options that several commands share."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from unmask.checkpoints import faster_dtype, load_all
from unmask.denoiser import Denoiser
from unmask.dtype import parse

BUNDLED_PAIR = ("heavy=sotu-heavy", "light=sotu-light")

Model = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="[NAME=]SOURCE",
        help="A denoiser: bundled name, checkpoint folder or file, or hub id. Give it once for each model. "
        f"Default: the bundled pair, {' and '.join(BUNDLED_PAIR)}.",
    ),
]
Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")]
Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16, or auto: the faster on this machine. Where exactness is claimed: float32."),
]
Device = Annotated[str, typer.Option(help="Where the models live: cpu, cuda.")]
TokenizerFile = Annotated[
    Path | None, typer.Option("--tokenizer", help="tokenizer.json for checkpoints that bring none (MDLM, SEDD).")
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; 1 is often fastest on a busy machine. Default: torch's choice.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def named_sources(texts: list[str] | None) -> dict[str, str]:
    """The sources of models by name, from NAME=SOURCE or SOURCE; the bundled pair when there are none."""
    named = [text.split("=", 1) if "=" in text else (Path(text).name, text) for text in texts or BUNDLED_PAIR]
    if len(dict(named)) < len(named):
        raise ValueError(f"model names must differ, got {', '.join(name for name, _ in named)}; write NAME=SOURCE")
    return dict(named)


def load_models(
    sources: dict[str, str], dtype: str = "float32", device: str = "cpu", tokenizer: Path | None = None
) -> dict[str, Denoiser]:
    """The denoisers of `named_sources`; a dtype chosen by timing is told on standard error."""
    chosen = parse(dtype)
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where torch {torch.__version__} finds one, got {device!r}")
    if chosen is None:
        choice = faster_dtype(sources.values(), device=device)
        chosen = choice.dtype
        print(choice, file=sys.stderr)
    return load_all(sources, dtype=chosen, device=device, tokenizer=tokenizer)


def set_threads(threads: int | None) -> None:
    """CPU threads of torch; None leaves its choice."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
