"""A profile on the page: one sampling run, its samples step by step, its ticks and its phases."""

from unmask.page.node import Node

MOST_TICKS = 2000  # bars of a timeline; neighbours of one model are drawn as one where there are more
RATES = ("occupancy", "tokens_per_second", "flops_per_second", "flops_share", "ceiling_flops_per_second")
BYTES = ("peak_bytes", "rss_peak_bytes", "logits_bytes_avoided")


def read(root: Node) -> dict:
    models = [_model(one) for one in root["models"].items(least=1)]
    steps = root["steps"]
    num_steps = steps["num_steps"].whole(1)
    return {
        "request": {key: one.value for key, one in root["request"].children() if one.value is not None},
        "models": models,
        "phases": {**_amounts(root["phases"]), "total": root["phases"]["total"].amount()},
        "model_seconds": _model_seconds(root["model_seconds"], models),
        "max_batch": root["max_batch"].whole(1),
        "ticks": _ticks(root["ticks"], len(models), root["max_batch"].whole(1)),
        "nfe": _amounts(root["nfe"]),
        **{key: root.get(key, Node.amount) for key in (*RATES, *BYTES)},
        "num_steps": num_steps,
        "step_models": steps["models"].wholes(num_steps, 0, len(models) - 1),
        "samples": [_sample(one, num_steps) for one in root["samples"].items()],
    }


def _model(node: Node) -> dict:
    sizes = {key: node[key].whole() for key in ("num_blocks", "hidden_size", "vocab_size", "num_parameters")}
    return {"name": node["name"].text(), **sizes}


def _model_seconds(node: Node, models: list[dict]) -> list[dict]:
    """In the order of `models`."""
    found = []
    for model in models:
        one = node[model["name"]]
        blocks = one.get("blocks", Node.items) or []
        seconds = {key: one[key].amount() for key in ("body", "head")}
        found.append({**seconds, "blocks": [block.amount() for block in blocks]})
    return found


def _amounts(node: Node) -> dict[str, float]:
    return {name: one.amount() for name, one in node.children()}


def _ticks(node: Node, num_models: int, max_batch: int) -> dict[str, list]:
    """model, start, end, num_sequences, num_rows; columns of at most `MOST_TICKS`, and how many ticks a bar stands
    for."""
    count = len(node["model"].items())
    model = node["model"].wholes(count, 0, num_models - 1)
    sequences = node["num_sequences"].wholes(count, 1, max_batch)
    rows = node["num_rows"].wholes(count)
    starts, totals = (node[key].numbers(count, 0) for key in ("start", "total"))
    ticks = list(zip(model, starts, map(sum, zip(starts, totals, strict=True)), sequences, rows, strict=True))
    size = -(-count // MOST_TICKS)
    bars = [tick for number in range(num_models) for tick in _merged([t for t in ticks if t[0] == number], size)]
    bars.sort(key=lambda bar: bar[1])
    columns = zip(*bars, strict=True) if bars else ((),) * 5
    names = ("model", "start", "end", "num_sequences", "num_rows")
    return {"count": count, "merged": size, **{name: list(c) for name, c in zip(names, columns, strict=True)}}


def _merged(ticks: list[tuple], size: int) -> list[tuple]:
    """Runs of `size` ticks of one model as one bar, with the mean of their sequences and rows."""
    if size <= 1:
        return ticks
    runs = [ticks[i : i + size] for i in range(0, len(ticks), size)]
    return [(run[0][0], run[0][1], run[-1][2], *(sum(t[k] for t in run) / len(run) for k in (3, 4))) for run in runs]


def _sample(node: Node, num_steps: int) -> dict:
    """A sample of a model without a tokenizer has no text, and no pieces."""
    index = node["index"].whole()
    if node["text"].value is None:
        return {"index": index, "pieces": None}
    pieces = node["pieces"].texts()
    if "".join(pieces) != node["text"].text():
        node["pieces"].fail("pieces that concatenate to the text")
    return {
        "index": index,
        "pieces": pieces,
        "logprobs": node["logprobs"].numbers(len(pieces)),
        "reveal_step": node["reveal_step"].wholes(len(pieces), -1, num_steps - 1),
    }
