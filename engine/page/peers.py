"""Peers on the page: whole runs beside what else could be picked, with intervals."""

from unmask.page.node import Node


def read(root: Node) -> dict:
    return {
        "rows": [_row(one) for one in root["rows"].items()],
        "skipped": [
            {key: one[key].text() for key in ("peer", "workload", "reason")} for one in root["skipped"].items()
        ],
    }


def _row(node: Node) -> dict:
    if node["role"].value not in ("ours", "peer"):
        node["role"].fail("ours or peer")
    seconds = node["seconds"]
    return {
        **{key: node[key].text() for key in ("workload", "peer", "role", "device", "dtype")},
        **{key: node.get(key, Node.positive) for key in ("batch", "length", "num_steps")},
        "seconds": {key: seconds[key].positive() for key in ("median", "p20", "p80")},
        "num_runs": len(seconds["runs"].items()),
        "tokens_per_second": node["tokens_per_second"].positive(),
        **{key: node.get(key, Node.amount) for key in ("tokens_per_second_std", "ratio", "ratio_low", "ratio_high")},
        "law_passed": node.get("law_passed", Node.flag),
        "note": node.get("note", Node.text),
    }
