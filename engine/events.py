"""What happens to a sequence: its planned reveals in order, and who computes them. Integers only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmask.reveal import RemaskPlan, RevealPlan


@dataclass(frozen=True, eq=False)
class Remasks:
    """What S sequences have beside their rows if positions are masked again.

    num_rows: int64 [S], how many of the table's n rows are a sequence's own; those behind repeat the last one.
    draw: int32 [S, n], how often the row's position was revealed before.
    position: int32 [S, M], the positions that are masked again, in the order of time; stop: int32 [S, n], how many of
    these are when the row is revealed. What `position` holds beyond a sequence's largest `stop` means nothing.
    """

    num_rows: np.ndarray
    draw: np.ndarray
    position: np.ndarray
    stop: np.ndarray


@dataclass(frozen=True, eq=False)
class Events:
    """The planned rows of S sequences with n reveals each, sorted by (step, position) along axis 1.

    sequence: int64 [S], the request's ids. length: tokens per sequence. position, step: int32 [S, n].
    mask_rate: float32 [S, n]. model: int8 [S, n], index of the model that computes the step.
    remasks: None where every masked position is revealed once and for all.
    """

    sequence: np.ndarray
    length: int
    position: np.ndarray
    step: np.ndarray
    mask_rate: np.ndarray
    model: np.ndarray
    remasks: Remasks | None = None


def events(
    plan: RevealPlan | RemaskPlan,
    positions: np.ndarray,
    length: int,
    sequence: np.ndarray,
    segments: Sequence[tuple[int, int, int]],
) -> Events:
    """The events of a plan: its entries in the order of their reveal.

    positions: int64 [n], the masked positions of the plan's columns, ascending. sequence: int64 [S], ids of its rows.
    segments: (model index, start, stop), contiguous from step 0, as `Schedule.assign` gives them for model names.
    """
    models, starts, stops = ([segment[i] for segment in segments] for i in range(3))
    if not segments or starts != [0, *stops[:-1]]:
        raise ValueError(f"segments must be contiguous from step 0, got {list(segments)}")
    if plan.step.size and plan.step.max() >= stops[-1]:
        raise ValueError(f"segments must cover step {plan.step.max()} of the plan, got an end at {stops[-1]}")
    if isinstance(plan, RemaskPlan):
        order, remasks = _remasks(plan, positions, len(sequence))
        step, mask_rate, position = (values[order] for values in (plan.step, plan.mask_rate, positions[plan.column]))
    else:
        order, remasks = np.argsort(plan.step, axis=1, kind="stable"), None
        step, mask_rate = (np.take_along_axis(values, order, axis=1) for values in (plan.step, plan.mask_rate))
        position = np.asarray(positions, np.int32)[order]
    return Events(
        sequence=np.asarray(sequence, np.int64),
        length=int(length),
        position=position.astype(np.int32, copy=False),
        step=step,
        mask_rate=mask_rate.astype(np.float32),
        model=np.array(models, np.int8)[np.searchsorted(stops, step, side="right")],
        remasks=remasks,
    )


def _remasks(plan: RemaskPlan, positions: np.ndarray, num_sequences: int) -> tuple[np.ndarray, Remasks]:
    """The plan's entries in a table, int64 [S, n], and what else there is to say about its rows."""
    order, num_rows = _table(plan.row, plan.step, plan.column, num_sequences)
    again = np.flatnonzero(plan.draw)
    chosen, _ = _table(plan.row[again], plan.masked[again], plan.column[again], num_sequences)
    # Positions masked in a step come into effect with the first event behind it.
    span = int(plan.step.max(initial=0)) + 1
    masked = np.sort(plan.row[again] * span + plan.masked[again])
    sequence = np.arange(num_sequences)[:, None]
    stop = np.searchsorted(masked, sequence * span + plan.step[order]) - np.searchsorted(masked, sequence * span)
    position = positions[plan.column[again]][chosen].astype(np.int32)
    return order, Remasks(num_rows, plan.draw[order], position, stop.astype(np.int32))


def _table(row: np.ndarray, step: np.ndarray, column: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the entries of each row in the order of (step, column), int64 [num_rows, most entries of a row], the
    last one repeated in shorter rows; and how many entries each row has, int64."""
    order, counts = np.lexsort((column, step, row)), np.bincount(row, minlength=num_rows)
    place = np.minimum(np.arange(counts.max(initial=0)), np.maximum(counts - 1, 0)[:, None])
    begin = (counts.cumsum() - counts)[:, None]
    return order[np.minimum(begin + place, max(0, len(order) - 1))], counts
