"""Where do the lighter models go? Placements of models over equal segments of the steps, and the published shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from math import factorial, prod

import numpy as np

from unmask.reveal import Reveal
from unmask.schedule import Schedule

SHAPES = "sandwich", "light first", "light last", "light middle", "interleaved", "random"
RANDOM_SEED, DRAWS = 0, 64  # the same for each number of segments and light ones, so that studies can be compared


@dataclass(frozen=True)
class Placement:
    """The model of each segment by name, from the start of a text to its end; segments are equal parts of the steps."""

    models: tuple[str, ...]

    @property
    def schedule(self) -> Schedule:
        """In percent, with equal neighbours merged."""
        runs = ((name, sum(1 for _ in group)) for name, group in groupby(self.models))
        return Schedule(tuple((name, Fraction(100 * size, len(self.models))) for name, size in runs), percent=True)

    def __str__(self) -> str:
        return str(self.schedule)


def check_segments(num_segments: int, reveal: Reveal, length: int) -> None:
    """Of more segments than steps some get no step, and placements that differ there are the same run."""
    steps = reveal.num_steps(length)
    if num_segments > steps:
        raise ValueError(
            f"segments must be at most the {steps} steps of {reveal} for {length} tokens, got {num_segments}"
        )


def arrangements(reference: str, counts: Mapping[str, int], num_segments: int) -> Iterator[Placement]:
    """Every distinct placement in which each model of `counts` has that many segments, and `reference` the others.

    Raises ValueError for counts that are not positive or leave less than no segment; see `num_arrangements`.
    """
    left = {reference: num_segments - sum(counts.values()), **counts}
    num_arrangements(counts, num_segments)

    def extend(start: tuple[str, ...]) -> Iterator[Placement]:
        if len(start) == num_segments:
            yield Placement(start)
            return
        for name in left:
            if left[name]:
                left[name] -= 1
                yield from extend((*start, name))
                left[name] += 1

    return extend(())


def num_arrangements(counts: Mapping[str, int], num_segments: int) -> int:
    """How many `arrangements` there are: S! / (k1! k2! ... (S - k1 - k2 - ...)!)."""
    if num_segments < 1:
        raise ValueError(f"segments must be at least 1, got {num_segments}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"a model must be placed on at least 1 segment, got {count} for {name!r}")
    placed = sum(counts.values())
    if placed > num_segments:
        raise ValueError(f"models must be placed on at most the {num_segments} segments there are, got {placed}")
    return factorial(num_segments) // prod(map(factorial, (*counts.values(), num_segments - placed)))


def shapes(num_segments: int, num_light: int) -> dict[str, tuple[int, ...]]:
    """The light segments of each published shape (Sedykh et al. 2026, arXiv 2604.02340; `SHAPES`), ascending.

    sandwich: half at each end, an odd one more at the start. light middle: in one piece, an odd heavy segment behind
    it. interleaved: segment floor((i + 1/2) S / k) for i < k. random: fixed by S and k, the first of `DRAWS` draws that
    has no other shape. Of a single light segment there is no sandwich and nothing to interleave, and with all segments
    light there is no shape. Few segments may give two shapes the same placement.
    """
    if not 0 < num_light < num_segments:
        return {}
    ends = {*range((num_light + 1) // 2), *range(num_segments - num_light // 2, num_segments)}
    middle = (num_segments - num_light) // 2
    found = {
        "sandwich": ends,
        "light first": range(num_light),
        "light last": range(num_segments - num_light, num_segments),
        "light middle": range(middle, middle + num_light),
        "interleaved": ((2 * i + 1) * num_segments // (2 * num_light) for i in range(num_light)),
    }
    if num_light == 1:
        del found["sandwich"], found["interleaved"]
    found = {name: tuple(sorted(segments)) for name, segments in found.items()}
    rng = np.random.default_rng([RANDOM_SEED, num_segments, num_light])
    drawn = [tuple(sorted(rng.permutation(num_segments)[:num_light].tolist())) for _ in range(DRAWS)]
    return {**found, "random": next((one for one in drawn if one not in found.values()), drawn[0])}


def published_shapes(reference: str, counts: Mapping[str, int], num_segments: int) -> list[Placement]:
    """The placements of one light model, with as many segments as `counts` says, that have a published shape.

    Raises ValueError for several light models, or where there is no shape.
    """
    num_arrangements(counts, num_segments)
    (name, num_light), *others = counts.items()
    if others:
        raise ValueError(f"published shapes must be of one model beside {reference!r}, got {', '.join(counts)}")
    found = set(shapes(num_segments, num_light).values())
    if not found:
        raise ValueError(
            f"published shapes must leave {reference!r} a segment, got {num_light} of {num_segments} light"
        )
    return [Placement(tuple(name if i in light else reference for i in range(num_segments))) for light in sorted(found)]


def shapes_of(placement: Placement, reference: str) -> tuple[str, ...]:
    """The published shapes that a placement has, none if it is of more than one model beside `reference`."""
    light = tuple(i for i, name in enumerate(placement.models) if name != reference)
    if len({placement.models[i] for i in light}) != 1:
        return ()
    published = shapes(len(placement.models), len(light))
    return tuple(name for name, segments in published.items() if segments == light)
