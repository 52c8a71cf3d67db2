"""Result files by kind: what a page shows of each."""

from collections.abc import Callable, Sequence
from pathlib import Path

from unmask.page import operators, peers, profile, studies
from unmask.page.node import Node

SCHEMA = 1
READERS: dict[str, Callable[[Node], dict]] = {
    "operators": operators.read,
    "peers": peers.read,
    "profile": profile.read,
    "search": studies.read_search,
    "importance": studies.read_importance,
}
# Studies may come without a kind; these keys tell them.
KEYS = {"search": {"models", "num_segments", "measure", "rows"}, "importance": {"models", "bins", "draws"}}


def read(paths: Sequence[Path]) -> list[dict]:
    """What a page shows of each file, in their order, JSON-ready.

    Raises ValueError, naming file and field, for what is not a result file.
    """
    return [_read(Node.load(path)) for path in paths]


def _read(root: Node) -> dict:
    kind = _kind(root)
    schema = root.get("schema")
    if schema is not None and schema.whole() != SCHEMA:
        schema.fail(str(SCHEMA))
    partial = root.get("partial")
    return {
        "kind": kind,
        "file": root.file,
        "partial": partial is not None and partial.flag(),
        "about": _about(root),
        **READERS[kind](root),
    }


def _kind(root: Node) -> str:
    known = f"{', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}"
    if root.get("kind"):
        kind = root["kind"]
        if kind.value not in list(READERS):
            kind.fail(known)
        return kind.text()
    found = next((kind for kind, keys in KEYS.items() if keys <= set(root.keys())), None)
    if found is None:
        raise ValueError(f"{root.file}: kind is missing; it must be {known}")
    return found


def _about(root: Node) -> dict:
    """Where and with what it was measured, as far as the file tells."""
    machine, versions, command = root.get("machine"), root.get("versions"), root.get("command")
    texts = {key: root.get(key) for key in ("commit", "date")}
    return {
        "command": command and command.texts(),
        "machine": machine and _plain(machine),
        "versions": versions and _plain(versions),
        "notes": [text for key in ("notes", "failures") if (found := root.get(key)) for text in found.texts()],
        **{key: found and found.text() for key, found in texts.items()},
    }


def _plain(node: Node) -> dict[str, str]:
    return {key: str(value.value) for key, value in node.children() if value.value is not None}
