"""Values of a result file that know where they stand, so that what is wrong is said by file and field."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Read = TypeVar("Read")

SHOWN = 60  # characters of a wrong value in an error
LARGEST = 1e300  # that a page computes with


class Node:
    """A JSON value at `path` of `file`. Every reader raises ValueError, one line, if the value is not what it reads."""

    def __init__(self, value: Any, file: str, path: str = "") -> None:
        self.value, self.file, self.path = value, file, path

    @classmethod
    def load(cls, path: Path) -> "Node":
        """The object in a JSON file. Raises ValueError if there is none, or if it has a NaN in it."""
        try:
            root = cls(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse), str(path))
        except OSError as error:
            raise ValueError(f"{path}: could not be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: must be JSON, got {error}") from error
        root.keys()
        return root

    def fail(self, expected: str) -> NoReturn:
        text = json.dumps(self.value, ensure_ascii=False)
        shown = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
        raise ValueError(f"{self.file}: {self.path or 'the file'} must be {expected}, got {shown}")

    def __getitem__(self, key: str) -> "Node":
        if key not in self.keys():
            raise ValueError(f"{self.file}: {self._below(key)} is missing")
        return Node(self.value[key], self.file, self._below(key))

    def get(self, key: str, read: Callable[["Node"], Read]) -> Read | None:
        """What `read` makes of the value; None where the key is missing or its value is null."""
        return None if self.keys().get(key) is None else read(self[key])

    def keys(self) -> dict[str, Any]:
        return self._of(dict, "an object")

    def items(self, least: int = 0) -> list["Node"]:
        values = self._of(list, "a list")
        if len(values) < least:
            self.fail(f"a list of at least {least}")
        return [Node(value, self.file, f"{self.path}[{i}]") for i, value in enumerate(values)]

    def children(self) -> Iterator[tuple[str, "Node"]]:
        return ((key, self[key]) for key in self.keys())

    def text(self) -> str:
        return self._of(str, "text")

    def flag(self) -> bool:
        return self._of(bool, "true or false")

    def number(self) -> float:
        if not _is_number(self.value):
            self.fail("a number")
        return self.value

    def amount(self) -> float:
        if not _is_number(self.value) or self.value < 0:
            self.fail("a number from 0 on")
        return self.value

    def positive(self) -> float:
        if not _is_number(self.value) or self.value <= 0:
            self.fail("a positive number")
        return self.value

    def whole(self, least: int = 0) -> int:
        if not _is_whole(self.value) or self.value < least:
            self.fail(f"a whole number from {least} on")
        return self.value

    def texts(self, least: int = 0) -> list[str]:
        return [one.text() for one in self.items(least)]

    def numbers(self, count: int, least: float = -math.inf) -> list[float]:
        """A column of `count` numbers; thousands of them, so no node for each."""
        return self._column(count, "numbers", least, math.inf, _is_number)

    def wholes(self, count: int, least: int = 0, most: float = math.inf) -> list[int]:
        """A column of `count` whole numbers from `least` to `most`."""
        return self._column(count, "integers", least, most, _is_whole)

    def _column(self, count: int, what: str, least: float, most: float, right: Callable[[Any], bool]) -> list:
        if not isinstance(self.value, list) or len(self.value) != count or not all(map(right, self.value)):
            self.fail(f"a list of {count} {what}")
        wrong = next((i for i, value in enumerate(self.value) if not least <= value <= most), None)
        if wrong is not None:
            self.items()[wrong].fail(f"from {least:g} " + ("on" if most == math.inf else f"to {most:g}"))
        return self.value

    def _of(self, kind: type, expected: str) -> Any:
        if not isinstance(self.value, kind):
            self.fail(expected)
        return self.value

    def _below(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"a number that is {name}")
