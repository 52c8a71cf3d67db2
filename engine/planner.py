"""From templates to what a timeline packs: reveal plans of planned policies, trajectories of adaptive ones."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from unmask.adaptive import trajectory
from unmask.constraints import Constraints
from unmask.events import Events, events
from unmask.kernels.noise import check_seed, policy_uniforms, reveal_times
from unmask.reveal import Reveal
from unmask.rounds import Request
from unmask.schedule import Schedule

# Sequences are planned together up to this many positions, to share the cost of the array operations.
POSITIONS = 1 << 14

Template = tuple[np.ndarray, int]  # int64 [L], and how many sequences share it


@dataclass(frozen=True, eq=False, kw_only=True)
class Planned(Events):
    """Planned sequences with the template int64 [L] that they share, and the list of ids int32 [L] that each position
    may draw from, if there are any lists."""

    template: np.ndarray
    allowed: np.ndarray | None = None

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """What is written into their slots, [L] each."""
        rows = {"tokens": self.template}
        return rows if self.allowed is None else rows | {"allowed": self.allowed}


@dataclass(frozen=True)
class Planner:
    """Plans sequences as a timeline asks for them, in the order of their ids.

    reveal, schedule: policies. models: names, in the order of their numbers. draw_mask: see `Categorical`.
    """

    reveal: Reveal
    schedule: Schedule
    models: Sequence[str]
    mask_id: int
    draw_mask: bool = False

    def masked(self, template: np.ndarray) -> np.ndarray:
        """int64 [n], the masked positions."""
        return np.flatnonzero(template == self.mask_id)

    def segments(self, num_masked: int) -> list[tuple[int, int, int]]:
        """(model index, first step, step after the last) for the trajectory of `num_masked` positions."""
        assigned = self.schedule.assign(self.reveal.num_steps(num_masked))
        return [(self.models.index(name), start, stop) for name, start, stop in assigned]

    def check(self, template: np.ndarray) -> None:
        """Raise ValueError unless the policies suit the template."""
        positions = self.masked(template)
        self.segments(len(positions))
        if not getattr(self.reveal, "adaptive", False):
            self.reveal.plan(np.empty((0, len(positions))), positions)

    def check_lists(self, templates: Iterable[Template], constraints: Constraints) -> None:
        """Raise ValueError unless the lists of ids suit all templates."""
        for _ in self._chunks(templates, constraints, POSITIONS):
            pass

    def planned(self, templates: Iterable[Template], seed: int, constraints: Constraints) -> Iterator[Planned]:
        """Of a planned policy: reveal plans, of several sequences with one template at a time."""
        check_seed(seed)
        remasks = getattr(self.reveal, "remasks", False)
        for template, sequence, allowed in self._chunks(templates, constraints, POSITIONS):
            positions = self.masked(template)
            times = reveal_times(seed, torch.from_numpy(sequence)[:, None], torch.from_numpy(positions)).numpy()
            more = (partial(_uniform, seed, sequence, positions),) if remasks else ()
            plan = self.reveal.plan(times, positions, *more)
            made = events(plan, positions, len(template), sequence, self.segments(len(positions)))
            yield Planned(**vars(made), template=template, allowed=allowed)

    def adaptive(self, templates: Iterable[Template], constraints: Constraints) -> Iterator[Request]:
        """Of an adaptive policy: the steps that the host knows."""
        for template, sequence, allowed in self._chunks(templates, constraints, POSITIONS):
            positions = self.masked(template)
            steps = trajectory(self.reveal, positions, draw_mask=self.draw_mask)
            models, _, stops = zip(*self.segments(len(positions)), strict=True)
            model = np.array(models, np.int8)[np.searchsorted(stops, steps.step, side="right")]
            yield Request(sequence, template, positions, steps, model, allowed)

    def _chunks(
        self, templates: Iterable[Template], constraints: Constraints, most: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """(template, ids int64 [S], lists of ids), S sequences of at most so many positions together."""
        first = 0
        for template, count in templates:
            size = 1 if constraints.one_for_each else max(1, most // len(template))
            for start in range(first, first + count, size):
                allowed = constraints.of(start, self.masked(template), len(template)) if constraints else None
                yield template, np.arange(start, min(start + size, first + count)), allowed
            first += count


def _uniform(
    seed: int, sequence: np.ndarray, positions: np.ndarray, row: np.ndarray, column: np.ndarray, count: int
) -> np.ndarray:
    """Random numbers that a policy asks for by row and column of its plan, see `unmask.reveal.Uniform`."""
    return policy_uniforms(seed, torch.from_numpy(sequence[row]), torch.from_numpy(positions[column]), count).numpy()
