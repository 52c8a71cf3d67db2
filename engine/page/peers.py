"""Peers on the page: whole runs beside what else could be picked, with intervals."""

from unmask.page.node import Node

RATIO = ("ratio", "ratio_low", "ratio_high")


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
    seconds, note, passed = node["seconds"], node.get("note"), node.get("law_passed")
    return {
        **{key: node[key].text() for key in ("workload", "peer", "role", "device", "dtype")},
        **{key: (found := node.get(key)) and found.whole(1) for key in ("batch", "length", "num_steps")},
        "seconds": {key: seconds[key].positive() for key in ("median", "p20", "p80")},
        "num_runs": len(seconds["runs"].items()),
        "tokens_per_second": node["tokens_per_second"].positive(),
        "tokens_per_second_std": node["tokens_per_second_std"].number(0) if node.get("tokens_per_second_std") else None,
        **{key: (found := node.get(key)) and found.number(0) for key in RATIO},
        "law_passed": passed and passed.flag(),
        "note": note and note.text(),
    }
