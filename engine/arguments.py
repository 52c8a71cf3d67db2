"""Checks of what policies and token choices are given, and words for what is wrong with it."""

from collections.abc import Iterable, Sequence

import numpy as np

GRIDS = ("linear", "cosine")
DIRECTIONS = ("left-to-right", "right-to-left")
MAX_STEPS = 1_000_000  # the cosine grid, rounded to 2^-40, still falls strictly at this many steps


def checked(times: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of `Reveal.plan` as arrays."""
    times, positions = np.asarray(times, np.float64), np.asarray(positions)
    if positions.ndim != 1 or len(positions) == 0 or positions[0] < 0 or (positions[1:] <= positions[:-1]).any():
        raise ValueError(f"positions must be ascending masked positions, at least one, got {short(positions.tolist())}")
    if times.ndim != 2 or times.shape[1] != len(positions):
        raise ValueError(f"times must have shape [sequences, {len(positions)}], got {list(times.shape)}")
    outside = ~((times > 0) & (times < 1))  # true for NaN as well
    if outside.any():
        raise ValueError(f"times must lie strictly between 0 and 1, got {times[outside][0]}")
    return times, positions


def checked_steps(steps: int) -> int:
    checked_whole("steps", steps)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must lie between 1 and {MAX_STEPS}, got {steps}")
    return int(steps)


def checked_whole(name: str, number: int, least: int | None = None) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {number!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return int(number)


def checked_ids(name: str, ids: Iterable[int], vocab_size: int | None = None) -> tuple[int, ...]:
    wanted = f"{name} must hold ids from 0" + ("" if vocab_size is None else f" to {vocab_size - 1}")
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"{name} must be a list of ids, got {short(ids)}")
    ids = tuple(ids)
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int | np.integer):
            raise TypeError(f"{wanted}, got {one!r}")
        if one < 0 or (vocab_size is not None and one >= vocab_size):
            raise ValueError(f"{wanted}, got {one}")
    return tuple(map(int, ids))


def checked_grid(grid: str | Sequence[float], steps: int) -> str | tuple[float, ...]:
    wanted = f"grid must be {listed(GRIDS)}, or steps + 1 = {steps + 1} numbers falling strictly from 1 to 0 or above"
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise ValueError(f"{wanted}, got {grid!r}")
        return grid
    try:
        rates = np.asarray(grid, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{wanted}, got {short(grid)}") from None
    if rates.shape != (steps + 1,):
        raise ValueError(f"{wanted}, got shape {list(rates.shape)}: {short(rates.tolist())}")
    if rates[0] != 1:
        raise ValueError(f"{wanted}, got a start at {rates[0]}")
    rising = np.flatnonzero(~(rates[1:] < rates[:-1]))
    if len(rising):
        k = int(rising[0])
        raise ValueError(f"{wanted}, got {rates[k]} and then {rates[k + 1]} at {k} and {k + 1}")
    if rates[-1] < 0:
        raise ValueError(f"{wanted}, got an end at {rates[-1]}")
    return tuple(rates.tolist())


def checked_order(order: str | Sequence[int]) -> str | tuple[int, ...]:
    wanted = f"order must be {listed(DIRECTIONS)}, or distinct positions"
    if isinstance(order, str):
        if order not in DIRECTIONS:
            raise ValueError(f"{wanted}, got {order!r}")
        return order
    try:
        array = np.asarray(order)
    except ValueError:
        raise TypeError(f"{wanted}, got {short(order)}") from None
    if array.ndim != 1 or not (len(array) and np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"{wanted} (whole numbers, at least one), got {short(order)}")
    values, counts = np.unique(array, return_counts=True)
    if values[0] < 0:
        raise ValueError(f"{wanted} counted from 0, got {values[0]}")
    if (counts > 1).any():
        raise ValueError(f"{wanted}, got {values[counts > 1][0]} more than once")
    return tuple(array.tolist())


def commas(values: Sequence[float]) -> str:
    return ",".join(map(repr, values))


def listed(words: Sequence[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
