"""Cases of every operator, one file each, named as the operator: adding one is that file."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.cases.case import SEED, Case, Family, Point, family
from benchmarks.shapes import Shape
from unmask.kernels.dispatch import explain

__all__ = ["SEED", "Case", "Family", "Point", "family", "operators", "points"]


def operators() -> dict[str, list[str]]:
    """Every operator of the registry and its implementations, fastest first."""
    found: dict[str, list[str]] = {}
    for line in explain():
        found.setdefault(line.operator, []).append(line.implementation)
    return found


def points(
    names: Iterable[str], shapes: Mapping[str, Shape], device: str, counts: Mapping[str, Sequence[int] | None]
) -> list[Point]:
    """Cases of these operators at every shape; `counts`: of rows and of sequences, None for the usual ones."""
    found = []
    for model, shape in shapes.items():
        for name in names:
            each = family(name)
            sizes = counts[each.counts] or each.usual[device]
            found += [
                Point(name, part, model, shape, size)
                for part in each.parts
                for size in sizes
                if each.fits(part, shape, size)
            ]
    return found
