"""The `unmask report` command."""

from pathlib import Path
from typing import Annotated

import typer

from unmask.files import replace_whole
from unmask.page.render import render
from unmask.page.results import read

EXAMPLE = "Example:  unmask profile -n 16 --out run.json && unmask report run.json -o report.html"


def report_command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN.json...",
            help="Results of unmask profile, python -m benchmarks run and peers, unmask study search and importance.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Make one HTML file of results: texts while they unmask, ticks, phases, rooflines, peers, schedules."""
    if not runs:
        raise ValueError("report needs result files, got none; unmask profile --out run.json writes one")
    _check_out(out, runs)
    page = render(read(runs))
    try:
        replace_whole(out, lambda file: file.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise OSError(f"out {str(out)!r} could not be written: {error.strerror}") from error
    print(f"{out}: {len(runs)} result file{'s' * (len(runs) > 1)}, {len(page.encode()) / 1000:.0f} kB")


def _check_out(out: Path, runs: list[Path]) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"out must lie in a folder that exists, got {str(out)!r}")
    if out.is_dir():
        raise ValueError(f"out must be a file, got the folder {str(out)!r}")
    if out.resolve() in [run.resolve() for run in runs]:
        raise ValueError(f"out must not be one of the result files, got {str(out)!r}")
