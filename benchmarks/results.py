"""Result files: written whole, read with errors that name the file and the field."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
