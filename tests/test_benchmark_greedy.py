"""The benchmark of greedy decoding: what it times, what it compares, what it writes."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import greedy
from benchmarks.peers.plain_llama import PlainLlama
from unmask.denoiser import Batch
from unmask.live import wrap
from unmask.workspace import Workspace

TINY = greedy.SMOL._replace(
    vocab_size=71, hidden_size=32, num_blocks=2, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8
)

# Left to right, one likeliest token in each step: not LLaDA's order, so most tokens differ from ours.
GENERATE = """
import torch

def generate(model, prompt, steps, gen_length, block_length, mask_id):
    tokens = torch.cat([prompt, torch.full((len(prompt), gen_length), mask_id)], 1)
    for place in range(prompt.shape[1], tokens.shape[1]):
        tokens[:, place] = model(tokens).logits[:, place].argmax(-1)
    return tokens
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(greedy, "SMOL", TINY)
    (tmp_path / "generate.py").write_text(GENERATE)
    return tmp_path


def test_the_plain_network_is_the_one_that_is_wrapped():
    module = PlainLlama(TINY, 16)
    model, tokens = wrap(module), torch.randint(70, (2, 16), generator=torch.manual_seed(1))
    assert model.spec.mask_id == 70 and not model.spec.shift
    workspace = Workspace([model.buffers(32, 32, 2)])
    hidden = model.hidden(Batch(tokens.flatten(), (16, 16), torch.arange(32), (16, 16), torch.ones(2)), workspace)
    assert torch.allclose(hidden @ model.head.weight.T, module(tokens).logits.flatten(0, 1), atol=1e-4)


def test_a_run_is_written_whole(checkout, tmp_path, capsys):
    sizes = ["--blocks", "2", "--prompt", "5", "--gen-length", "16", "--block-length", "8", "--steps", "8"]
    out = tmp_path / "greedy.json"
    options = ["--llada", str(checkout), "--rounds", "2", "--threads", "1", "--no-memory", "--out", str(out)]
    assert command.main(["greedy", *options, *sizes]) == 0
    found = json.loads(out.read_text())
    rows = {(row["name"], row["dtype"]): row for row in found["rows"]}
    assert (found["kind"], found["schema"], found["partial"]) == ("greedy", 1, False)
    assert rows.keys() == {(name, dtype) for name in ("LLaDA", "unmask", *greedy.CACHES) for dtype in greedy.DTYPES}
    assert str(tmp_path) not in out.read_text()
    for (name, dtype), row in rows.items():
        theirs = rows["LLaDA", dtype]["seconds"]
        assert len(row["seconds"]) == 2 and 0 <= row["equal"] <= 1
        if name == "LLaDA":
            assert row["equal"] == 1 and row["ratio"] is None
        else:
            pairs = sorted(a / b for a, b in zip(theirs, row["seconds"], strict=True))
            assert row["ratio_own"] == pytest.approx(sum(pairs) / 2)
    assert rows["unmask", "float32"]["equal"] < 1  # the stand-in goes another way
    assert "unmask" in capsys.readouterr().err


def test_a_missing_checkout_is_named(tmp_path):
    with pytest.raises(SystemExit, match="--llada must be a checkout of"):
        greedy.main(["--llada", str(tmp_path / "none")])
