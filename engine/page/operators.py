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
    timings = node["timings"]
    return {
        **{key: node[key].text() for key in ("operator", "case", "implementation", "role", "device", "dtype")},
        "num_bytes": node["num_bytes"].amount(),
        "flops": node["flops"].amount(),
        "timings": {clock: timings.get(clock, _timing) for clock in CLOCKS},
        **{key: node.get(key, Node.amount) for key in SHARES},
        **{key: node.get(key, Node.text) for key in ("law", "note")},
        "law_passed": node.get("law_passed", Node.flag),
    }


def _timing(node: Node) -> dict[str, float]:
    return {key: node[key].positive() for key in ("median", "p20", "p80")}


def _ceiling(node: Node) -> dict:
    """A machine whose ceiling of one sort was not measured has null there."""
    return {
        **{key: node[key].text() for key in ("device", "dtype")},
        **{key: node.get(key, Node.amount) for key in ("bandwidth", "product")},
    }
