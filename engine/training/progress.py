"""Progress of a training run: a bar with loss and tokens per second, or plain lines where there is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from unmask.training.trainer import Report, Trainer

LINE_SECONDS = 10.0


@contextmanager
def follow(trainer: Trainer) -> Iterator[Callable[[Report], None]]:
    """Gives the function that `Trainer.run` calls after each step."""
    if sys.stderr.isatty():
        with _bar(trainer) as on_step:
            yield on_step
    else:
        yield _lines()


@contextmanager
def _bar(trainer: Trainer) -> Iterator[Callable[[Report], None]]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=trainer.config.steps, completed=trainer.step, detail="")
        heldout = ""

        def on_step(report: Report) -> None:
            nonlocal heldout
            if report.heldout_bits_per_byte is not None:
                heldout = f" held-out {report.heldout_bits_per_byte:.3f} bits/byte"
            progress.update(task, completed=report.step, detail=_describe(report) + heldout)

        yield on_step


def _lines() -> Callable[[Report], None]:
    last = 0.0

    def on_step(report: Report) -> None:
        nonlocal last
        heldout = report.heldout_bits_per_byte
        if heldout is None and report.step < report.steps and time.perf_counter() - last < LINE_SECONDS:
            return
        last = time.perf_counter()
        tail = "" if heldout is None else f", held-out {heldout:.3f} bits/byte"
        print(f"training: step {report.step}/{report.steps}, {_describe(report)}{tail}", file=sys.stderr, flush=True)

    return on_step


def _describe(report: Report) -> str:
    return f"loss {report.loss:.3f} nats/token, {report.tokens_per_second:,.0f} tokens/s"
