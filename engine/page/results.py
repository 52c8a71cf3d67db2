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
    if root.get("schema", Node.whole) not in (None, SCHEMA):
        root["schema"].fail(str(SCHEMA))
    return {
        "kind": kind,
        "file": Path(root.file).name,
        "partial": bool(root.get("partial", Node.flag)),
        "about": _about(root),
        **READERS[kind](root),
    }


def _kind(root: Node) -> str:
    known = f"{', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}"
    kind = root.get("kind", lambda node: node)
    if kind is not None:
        if kind.value not in list(READERS):
            kind.fail(known)
        return kind.text()
    found = next((kind for kind, keys in KEYS.items() if keys <= set(root.keys())), None)
    if found is None:
        raise ValueError(f"{root.file}: kind is missing; it must be {known}")
    return found


def _about(root: Node) -> dict:
    """Where and with what it was measured, as far as the file tells."""
    return {
        "command": root.get("command", Node.texts),
        **{key: root.get(key, _plain) for key in ("machine", "versions")},
        **{key: root.get(key, Node.text) for key in ("commit", "date")},
        "notes": [text for key in ("notes", "failures") for text in root.get(key, Node.texts) or []],
    }


def _plain(node: Node) -> dict[str, str]:
    return {key: str(value.value) for key, value in node.children() if value.value is not None}
