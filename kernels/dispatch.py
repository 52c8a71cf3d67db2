"""Who computes an operator: its implementations, why each can or cannot serve, and the pick among them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class UnsupportedImplementation(RuntimeError):
    """The implementation asked for cannot serve; the message says why and lists what can."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    status() -> (usable on this machine, one line saying what it is or what it lacks)
    refuses(*arguments) -> why it cannot serve these arguments, or None
    run: the computation; called with arguments already checked by the operator
    """

    name: str
    run: Callable
    status: Callable[[], tuple[bool, str]]
    refuses: Callable[..., str | None] = lambda *arguments: None


class Explanation(NamedTuple):
    """A line of `unmask info`. `picked`: what impl=None takes unless the arguments are of a kind it refuses."""

    operator: str
    implementation: str
    usable: bool
    picked: bool
    reason: str


class Operator:
    """An operator's name and its implementations, fastest first."""

    def __init__(self, name: str, implementations: tuple[Implementation, ...]):
        self.name, self.implementations = name, implementations
        _OPERATORS[name] = self

    def pick(self, impl: str | None, *arguments) -> Implementation:
        """The implementation called `impl`, or for None the fastest one that serves these arguments.

        ValueError for an unknown name, UnsupportedImplementation for one that cannot serve.
        """
        names = [one.name for one in self.implementations]
        if impl is not None and impl not in names:
            raise ValueError(f"impl of {self.name} must be None or one of {', '.join(map(repr, names))}, got {impl!r}")
        obstacles = {one.name: _obstacle(one, arguments) for one in self.implementations}
        for one in self.implementations:
            if impl in (None, one.name) and obstacles[one.name] is None:
                return one
        able = [name for name, obstacle in obstacles.items() if obstacle is None]
        reasons = "; ".join(f"{name}: {obstacles[name]}" for name in ([impl] if impl else names))
        serves = ", ".join(able) or "none"
        raise UnsupportedImplementation(
            f"impl={impl!r} of {self.name} cannot serve this call ({reasons}); supported here: {serves}"
        )

    def explain(self) -> list[Explanation]:
        states = [(one.name, *one.status()) for one in self.implementations]
        picked = next((name for name, usable, _ in states if usable), None)
        return [Explanation(self.name, name, usable, name == picked, reason) for name, usable, reason in states]


def explain() -> list[Explanation]:
    """Every implementation of every operator, fastest first, with the reason why it is or is not usable."""
    return [line for operator in _OPERATORS.values() for line in operator.explain()]


_OPERATORS: dict[str, Operator] = {}


def _obstacle(implementation: Implementation, arguments: tuple) -> str | None:
    usable, reason = implementation.status()
    return implementation.refuses(*arguments) if usable else reason
