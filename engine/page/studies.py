"""Studies on the page: the schedules of a search, and the importance of steps by mask rate."""

from unmask.page.node import Node


def read_search(root: Node) -> dict:
    models = root["models"].texts(least=1)
    num_segments = root["num_segments"].whole(1)
    return {
        "models": models,
        **{key: root[key].whole(1) for key in ("num_samples", "length")},
        **{key: root[key].text() for key in ("reveal", "measure")},
        "scorer": root.get("scorer", Node.text),
        "rows": [_row(one, models, num_segments) for one in root["rows"].items(least=1)],
    }


def _row(node: Node, models: list[str], num_segments: int) -> dict:
    segments = node["models"].texts()
    if len(segments) != num_segments or not set(segments) <= set(models):
        node["models"].fail(f"a list of {num_segments} out of {', '.join(models)}")
    return {
        "models": segments,
        "shapes": node["shapes"].texts(),
        "rank": node.get("rank", lambda one: one.whole(1)),
        "measure": _interval(node["measure"]),
        "on_front": node["on_front"].flag(),
        "saved": node["saved"]["without_head"].number(),
    }


def read_importance(root: Node) -> dict:
    models = root["models"].texts(least=1)
    bins = root["bins"].items(least=1)
    measured = {"loss": models, "gap": models[1:], "kl": models[1:]}
    return {
        "models": models,
        **{key: root[key].whole(1) for key in ("num_windows", "length")},
        "rates": [(one["low"].amount() + one["high"].amount()) / 2 for one in bins],
        **{key: {name: [_interval(one[key][name]) for one in bins] for name in on} for key, on in measured.items()},
    }


def _interval(node: Node) -> list[float]:
    """value, low, high."""
    return [node[key].number() for key in ("value", "low", "high")]
