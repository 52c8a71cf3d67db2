"""Operators on the page: the roofline and the table of their timings."""

from unmask.page.node import Node

CLOCKS = ("cold", "warm", "graph")
SHARES = ("bandwidth", "bandwidth_share", "rate", "rate_share")
ROLES = ("implementation", "peer", "part", "ceiling")


def read(root: Node) -> dict:
    return {
        "rows": [_row(one) for one in root["rows"].items()],
        "ceilings": [_ceiling(one) for one in root["ceilings"].items()],
    }


def _row(node: Node) -> dict:
    if node["role"].value not in ROLES:
        node["role"].fail(f"one of {', '.join(ROLES)}")
    passed, note, law = (node.get(key) for key in ("law_passed", "note", "law"))
    timings = node["timings"]
    return {
        **{key: node[key].text() for key in ("operator", "case", "implementation", "role", "device", "dtype")},
        "num_bytes": node["num_bytes"].number(0),
        "flops": node["flops"].number(0),
        "timings": {clock: _timing(found) if (found := timings.get(clock)) else None for clock in CLOCKS},
        **{key: (found := node.get(key)) and found.number(0) for key in SHARES},
        "law": law and law.text(),
        "law_passed": passed and passed.flag(),
        "note": note and note.text(),
    }


def _timing(node: Node) -> dict[str, float]:
    return {key: node[key].positive() for key in ("median", "p20", "p80")}


def _ceiling(node: Node) -> dict:
    """A machine whose ceiling of one sort was not measured has null there."""
    return {
        **{key: node[key].text() for key in ("device", "dtype")},
        **{key: (found := node.get(key)) and found.number(0) for key in ("bandwidth", "product")},
    }
