"""dtype="auto": the choice by made-up measurements, and what is measured."""

import pytest
import torch
from toys import random_dit

import unmask
from unmask import checkpoints
from unmask import dtype as dtypes
from unmask.dtype import Choice, faster, parse
from unmask.models.dit import Shape, tensor_shapes

NARROW_WINS = {torch.float32: 0.006, torch.bfloat16: 0.0031}
WIDE_WINS = {torch.float32: 0.006, torch.bfloat16: 0.012}


@pytest.fixture
def measured(monkeypatch):
    """Lets `dtype="auto"` find these seconds; gives the runs that would have been timed."""
    seen = []

    def pretend(seconds):
        def in_turns(runs, **options):
            seen.append(runs)
            return {dtype: [0.9 * seconds[dtype], seconds[dtype], 9 * seconds[dtype]] for dtype in runs}

        monkeypatch.setattr(dtypes, "in_turns", in_turns)
        return seen

    return pretend


@pytest.mark.parametrize("seconds", [NARROW_WINS, WIDE_WINS])
def test_auto_takes_the_faster(measured, seconds):
    measured(seconds)
    assert unmask.load("sotu-light", dtype="auto").dtype is min(seconds, key=seconds.get)


def test_the_choice_in_words():
    assert str(Choice(NARROW_WINS)) == "dtype bfloat16: a block takes 3.1 ms, 6 ms in float32"
    assert str(Choice(WIDE_WINS)) == "dtype float32: a block takes 6 ms, 12 ms in bfloat16"


def test_the_medians_decide(monkeypatch):
    taken = {torch.float32: [1.0, 2.0, 3.0], torch.bfloat16: [0.5, 2.5, 2.6]}
    monkeypatch.setattr(dtypes, "in_turns", lambda runs, **options: taken)
    assert faster(taken).seconds == {torch.float32: 2.0, torch.bfloat16: 2.5}


def test_the_largest_model_decides_for_all(measured, monkeypatch):
    seen, timed = measured(NARROW_WINS), []
    monkeypatch.setattr(checkpoints, "_block_call", lambda found, dtype, device: timed.append(found.name))
    assert checkpoints.faster_dtype(["sotu-light", "sotu-heavy"]).dtype is torch.bfloat16
    assert set(timed) == {"sotu-heavy"} and seen[0].keys() == {torch.float32, torch.bfloat16}


def dense(weight):
    """A weight as it was before a library laid it out its own way."""
    return weight.to_dense() if weight.is_mkldnn else weight


def test_a_block_of_the_models_shape_is_timed(measured, monkeypatch):
    made = []
    create = checkpoints.DiT.__init__

    def record(self, *arguments, **options):
        create(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(checkpoints.DiT, "__init__", record)
    seen = measured(WIDE_WINS)
    loaded = unmask.load("sotu-light", dtype="auto")
    for dtype, block in zip(seen[0], made, strict=False):
        assert block.dtype is dtype and len(block.blocks) == 1
        assert torch.equal(dense(block.blocks[0].up.weight), dense(loaded.blocks[0].up.weight).to(dtype))
        rows = seen[0][dtype]()
        assert rows.shape == (1024, loaded.spec.hidden_size) and rows.dtype is dtype and rows.isfinite().all()


def test_a_wide_model_is_timed_on_fewer_tokens(monkeypatch):
    monkeypatch.setattr(checkpoints, "BLOCK_FLOPS", 1)
    model = random_dit("it", 2)
    parameters = {"vocab_embed.embedding": model.embedding, "output_layer.linear.bias": model.head.bias}
    shapes = tensor_shapes(Shape(512, 64, 2, 128, tied=True))
    parameters |= {name: torch.ones(shape) for name, shape in shapes.items() if name not in parameters}
    found = checkpoints.Checkpoint(model.spec, parameters, None, "it")
    assert len(checkpoints._block_call(found, torch.float32, "cpu")()) == 64


def test_names():
    assert parse("float32") is parse(torch.float32) is torch.float32
    assert parse("bfloat16") is torch.bfloat16 and parse("auto") is None


@pytest.mark.parametrize("wrong", ["float16", torch.float16, "torch.float32 ", "", 32])
def test_wrong_names_are_told_the_three_right_ones(wrong):
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or auto, got"):
        unmask.load("sotu-light", dtype=wrong)
