"""Result files: written whole, read with errors that name the file and the field."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rows import KIND, WAYS, Row
from benchmarks.timing import Timing
from unmask.files import replace_whole


class MalformedResult(ValueError):
    """The message names the file and the field."""


def write(path: Path, content: dict) -> None:
    """As JSON, whole or not at all; folders that are not there are made."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def read(path: Path, kind: str) -> dict:
    """A result file of this kind; OSError or MalformedResult."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MalformedResult(f"{path}: not JSON: {error}") from None
    result = Field(str(path), content)
    result.must("kind", lambda value: value == kind, repr(kind))
    result.must("schema", lambda value: value == 1, "1")
    for name in ("machine", "versions"):
        result.must(name, lambda value: isinstance(value, dict), "an object")
    result.must("rows", lambda value: isinstance(value, list), "a list")
    return content


class Field:
    """An object of a file, with the way to it."""

    def __init__(self, path: str, content: Any):
        if not isinstance(content, dict):
            raise MalformedResult(f"{path}: must be an object, got {type(content).__name__}")
        self.path, self.content = path, content

    def must(self, name: str, good: Callable[[Any], bool], right: str) -> Any:
        """The field's value, which must be `right`."""
        value = self.content.get(name)
        if name not in self.content or not good(value):
            got = repr(value)[:40] if name in self.content else "none"
            raise MalformedResult(f"{self.path}: {name} must be {right}, got {got}")
        return value


def must_be_folder(path: Path) -> None:
    """Whether results can be written there, before anything is measured."""
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise ValueError(f"--out must be a folder, got {path}: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--out must be a folder that can be written to, got {path}")


def read_rows(path: Path) -> tuple[dict, list[Row]]:
    """A file of operators and its rows; OSError or MalformedResult."""
    content = read(path, KIND)
    return content, [_row(Field(f"{path}: rows[{n}]", each)) for n, each in enumerate(content["rows"])]


def _row(found: Field) -> Row:
    def text(name: str) -> str:
        return found.must(name, lambda value: isinstance(value, str), "a string")

    def number(name: str) -> int:
        return found.must(name, lambda value: isinstance(value, int) and value >= 0, "a number, not negative")

    def words(name: str) -> str | None:
        return found.must(name, lambda value: value is None or isinstance(value, str), "a string or null")

    names = "operator", "case", "part", "model", "unit", "implementation", "role", "device", "dtype", "side"
    timings = Field(f"{found.path}.timings", found.must("timings", lambda value: isinstance(value, dict), "an object"))
    shape = found.must("shape", lambda value: isinstance(value, dict), "an object")
    return Row(
        **{name: text(name) for name in names},
        **{name: number(name) for name in ("count", "num_bytes", "flops")},
        shape=shape,
        timings={way: _timing(timings, way) for way in WAYS},
        law=words("law"),
        law_passed=found.must("law_passed", lambda value: value in (None, True, False), "true, false or null"),
        note=words("note"),
    )


def _timing(timings: Field, way: str) -> Timing | None:
    given = timings.must(way, lambda value: value is None or isinstance(value, dict), "an object or null")
    if given is None:
        return None
    timing = Field(f"{timings.path}.{way}", given)

    def positive(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")

    seconds = (timing.must(name, positive, "a positive number") for name in ("median", "p20", "p80"))
    return Timing(*seconds, timing.must("rounds", positive, "a positive number"))
