"""Who computes each step? A schedule gives every step of a trajectory to one model, in contiguous segments."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,10}|/[1-9][0-9]{0,17})?)(%?)")
_FORMS = '"name:steps name:steps ...", "name:share% name:share% ...", or one bare name'


@dataclass(frozen=True)
class Schedule:
    """Segments in the order of the trajectory, all in steps or all in percent of it.

    segments: (model name, size); a size is a positive whole number of steps, or a positive share in percent.
    percent: whether sizes are shares; they then sum to exactly 100.

    The schedule of Sedykh, Sorokin, Malykh 2026, arXiv 2604.02340, has the light model at both ends and the heavy one
    in the
    middle: "light:12.5% heavy:75% light:12.5%".
    """

    segments: tuple[tuple[str, Fraction], ...]
    percent: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple((name, Fraction(size)) for name, size in self.segments))
        if not self.segments:
            raise ValueError(f"schedule must be {_FORMS}, got nothing")
        for name, size in self.segments:
            if size <= 0:
                raise ValueError(f"schedule must give every segment a positive size, got {self._spell(name, size)!r}")
            if not self.percent and size.denominator != 1:
                raise ValueError(
                    f"schedule must give whole steps, got {self._spell(name, size)!r}; "
                    f"for a share of the trajectory write {self._spell(name, size) + '%'!r}"
                )
        if self.percent and self._total != 100:
            raise ValueError(
                f"schedule must have shares that sum to 100%, got {_decimal(self._total)}% in {str(self)!r}"
            )

    @classmethod
    def single(cls, name: str) -> "Schedule":
        """One model for every step."""
        return cls(((name, Fraction(100)),), percent=True)

    @classmethod
    def parse(cls, text: str, names: Sequence[str]) -> "Schedule":
        """The schedule that `text` spells, for models called `names`.

        "light:125 heavy:750 light:125" counts steps, "light:12.5% heavy:75% light:12.5%" shares of the trajectory (a
        third is "100/3%"), and a bare "heavy" takes it all. Raises ValueError for an unknown name, a mix of both, or
        a bad size.
        """
        if not isinstance(text, str):
            raise TypeError(f"schedule must be text, {_FORMS}, got {text!r}")
        if text.strip() in names:
            return cls.single(text.strip())
        parts = [_parse_segment(part, names) for part in text.split()]
        if len({percent for _, _, percent in parts}) > 1:
            raise ValueError(f"schedule must be all in steps or all in percent, got both in {text!r}")
        return cls(tuple((name, size) for name, size, _ in parts), percent=bool(parts) and parts[0][2])

    @property
    def models(self) -> tuple[str, ...]:
        """Distinct model names in the order of their first segment."""
        return tuple(dict.fromkeys(name for name, _ in self.segments))

    def assign(self, num_steps: int) -> list[tuple[str, int, int]]:
        """Who computes a trajectory of `num_steps` steps: (name, start, stop) for steps start <= k < stop.

        The segments are contiguous and cover [0, num_steps). Shares are cut where their running sum falls, halves
        rounded up; a share too small to get a step of a short trajectory is left out. Raises ValueError if sizes in
        steps do not sum to `num_steps`.
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int):
            raise TypeError(f"num_steps must be a whole number, got {num_steps!r}")
        if num_steps < 1:
            raise ValueError(f"num_steps must be positive, got {num_steps}")
        if not self.percent and self._total != num_steps:
            raise ValueError(
                f"schedule must cover the trajectory of {num_steps} steps, got {self._total} steps in {str(self)!r}; "
                f"change the sizes, or use shares that fit any trajectory: {str(self._in_percent())!r}"
            )
        sums = accumulate((size for _, size in self.segments), initial=Fraction(0))
        cuts = [int(part * num_steps / self._total + Fraction(1, 2)) for part in sums]
        spans = zip(self.segments, cuts, cuts[1:], strict=False)
        return [(name, start, stop) for (name, _), start, stop in spans if start < stop]

    def __str__(self) -> str:
        return " ".join(self._spell(name, size) for name, size in self.segments)

    @property
    def _total(self) -> Fraction:
        return sum((size for _, size in self.segments), Fraction(0))

    def _spell(self, name: str, size: Fraction) -> str:
        return f"{name}:{_decimal(size)}{'%' if self.percent else ''}"

    def _in_percent(self) -> "Schedule":
        return Schedule(tuple((name, size * 100 / self._total) for name, size in self.segments), percent=True)


def _parse_segment(part: str, names: Sequence[str]) -> tuple[str, Fraction, bool]:
    name, colon, size = part.rpartition(":")
    if not colon:
        alone = f"schedule must give {part!r} a size, as it is not alone"
        raise ValueError(alone if part in names else _unknown(part, names))
    if name not in names:
        raise ValueError(_unknown(name, names))
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"schedule must be {_FORMS}, with positive sizes, got {part!r}")
    return name, Fraction(match[1]), bool(match[2])


def _unknown(name: str, names: Sequence[str]) -> str:
    return f"schedule must name known models ({', '.join(map(repr, names))}), got {name!r}"


def _decimal(size: Fraction) -> str:
    """`size` as a decimal number where that is exact and short, else as a fraction."""
    text = f"{float(size):.10f}".rstrip("0").rstrip(".")
    return text if Fraction(text) == size else str(size)
