"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import torch
import typer

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


def set_threads(threads: int | None) -> None:
    """CPU threads of torch; None leaves its choice."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
