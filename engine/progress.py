"""What people see of a run while it goes: a bar, plain lines where there is no terminal, or the texts unmasking."""

import sys
import time
from typing import Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text
from tokenizers import Tokenizer

from unmask.run import Run
from unmask.samples import Sample
from unmask.timeline import Tick

REFRESH_SECONDS = 0.08
LINE_SECONDS = 5.0
# About as wide as a token, so that a text hardly moves when it is revealed.
MASKED = "░░░"
COLOURS = ("bright_yellow", "bright_cyan", "bright_magenta", "bright_green")


class Progress:
    """Follows a run; this one shows nothing. A context manager, entered before the run starts."""

    @classmethod
    def on_stderr(cls) -> "Progress":
        """A bar on a terminal, plain lines elsewhere."""
        return Bar(Console(stderr=True)) if sys.stderr.isatty() else Lines(sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, num_samples: int, num_masked: int, models: list[str]) -> None:
        """Once, before the first tick: sequences and masked positions of the whole run, names of the models."""

    def update(self, run: Run, tick: Tick) -> None:
        """After each tick."""

    def finish(self, sample: Sample) -> Sample:
        """For each finished sample; returns it."""
        return sample


class Lines(Progress):
    """A line every few seconds: tokens revealed, sequences finished, the time left."""

    def __init__(self, file) -> None:
        self.file = file

    def start(self, num_samples: int, num_masked: int, models: list[str]) -> None:
        self.num_samples, self.num_masked = num_samples, num_masked
        self.revealed, self.finished = 0, 0
        self.started = self.last = time.perf_counter()

    def update(self, run: Run, tick: Tick) -> None:
        self.revealed += tick.num_revealed
        self.finished += int(tick.finished.sum())
        now = time.perf_counter()
        if now - self.last >= LINE_SECONDS or self.finished == self.num_samples:
            self.last = now
            share, seconds = self.revealed / self.num_masked, now - self.started
            left = f", {seconds / share - seconds:.0f} s left" if share > 0 else ""
            print(
                f"sampling: {share:4.0%}, {self.revealed:,} of {self.num_masked:,} tokens, "
                f"{self.finished} of {self.num_samples} sequences, {seconds:.0f} s{left}",
                file=self.file,
                flush=True,
            )


class Bar(Progress):
    """One line on a terminal: tokens revealed, the model at work, the time gone and left."""

    def __init__(self, console: Console) -> None:
        self.bar = RichProgress(
            TextColumn("sampling"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,} tokens"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def start(self, num_samples: int, num_masked: int, models: list[str]) -> None:
        self.models = models
        self.task = self.bar.add_task("sampling", total=num_masked, detail="")

    def update(self, run: Run, tick: Tick) -> None:
        self.bar.update(self.task, advance=tick.num_revealed, detail=self.models[tick.model])


class Unmasking(Bar):
    """The first few texts on a terminal while they are unmasked, fresh tokens in the colour of their model."""

    def __init__(self, console: Console, tokenizer: Tokenizer, mask_id: int, num_shown: int = 8) -> None:
        super().__init__(console)
        self.console, self.tokenizer, self.mask_id, self.num_shown = console, tokenizer, mask_id, num_shown
        self.texts: dict[int, Text] = {}
        self.slots: dict[int, tuple[int, int]] = {}
        self.fresh: dict[int, dict[int, int]] = {}
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self.last = 0.0

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def start(self, num_samples: int, num_masked: int, models: list[str]) -> None:
        super().start(num_samples, num_masked, models)
        # Two lines of each text, its frame and the bar must fit: what does not fit cannot be erased either.
        fitting = max(1, (self.console.height - 3) // 4)
        self.num_shown = min(self.num_shown, num_samples, fitting)

    def update(self, run: Run, tick: Tick) -> None:
        super().update(run, tick)
        self._note(tick)
        now = time.perf_counter()
        finished = set(tick.sequences[tick.finished].tolist()) & self.slots.keys()
        if now - self.last < REFRESH_SECONDS and not finished:
            return
        self.last = now
        for sequence, (slot, length) in list(self.slots.items()):
            fresh = self.fresh.pop(sequence, {})
            self.texts[sequence] = self._text(run.tokens_of(slot, length), {} if sequence in finished else fresh)
            if sequence in finished:
                del self.slots[sequence]
        self.live.update(self.render(), refresh=True)

    def _note(self, tick: Tick) -> None:
        """Remember where the shown sequences live and which of their tokens this tick revealed."""
        for slots, planned, rows in tick.admitted:
            for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
                if planned.sequence[row] < self.num_shown:
                    self.slots[int(planned.sequence[row])] = (slot, planned.length)
        owners = np.repeat(tick.sequences, tick.row_counts)
        shown = owners < self.num_shown
        for sequence, position in zip(owners[shown].tolist(), tick.row_position[shown].tolist(), strict=True):
            self.fresh.setdefault(sequence, {})[position] = tick.model

    def _text(self, tokens: np.ndarray, fresh: dict[int, int]) -> Text:
        """Spans of equal standing, decoded together because a character may be cut between two tokens."""
        styles = ["dim" if token == self.mask_id else "" for token in tokens.tolist()]
        for position, model in fresh.items():
            if tokens[position] != self.mask_id:  # else masked again since
                styles[position] = "bold " + COLOURS[model % len(COLOURS)]
        text, start = Text(), 0
        for end in range(1, len(styles) + 1):
            if end == len(styles) or styles[end] != styles[start]:
                span = tokens[start:end]
                words = MASKED * len(span) if styles[start] == "dim" else self.tokenizer.decode(span.tolist(), False)
                text.append(words.replace("\n", " "), styles[start])
                start = end
        return text

    def render(self) -> Group:
        """The texts, each cut to its share of the screen, and the bar below."""
        lines = max(1, (self.console.height - 3) // self.num_shown - 2)
        width = self.console.width - 4
        panels = []
        for sequence in range(self.num_shown):
            text = self.texts.get(sequence, Text(MASKED * width, "dim"))
            rows = text.wrap(self.console, width)
            if len(rows) > lines:
                rows[lines - 1].truncate(width - 1)
                rows[lines - 1].append("…", "dim")
            wrapped = Text("\n").join(rows[:lines])
            panels.append(Panel(wrapped, height=lines + 2, title=str(sequence), title_align="left", border_style="dim"))
        return Group(*panels, self.bar)
