"""Early exits: what is trained, what is stored, and weights that two models share."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unmask
from unmask import early_exit
from unmask.checkpoints import read
from unmask.early_exit import OWN
from unmask.models.dit import DiT
from unmask.pickles import CheckpointError
from unmask.training import bound
from unmask.training.config import TrainConfig
from unmask.training.trainer import Trainer

WORDS = ("the", "of", "union", "state", "congress", "people", "government", "war", "peace", "nation", "year", "law")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a model of three blocks, `heavy`, and its exit after two, `exit`."""
    folder = tmp_path_factory.mktemp("runs")
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(12):
        text = " ".join(draw.choice(WORDS) for _ in range(300))
        (folder / "texts" / f"speech-{number}.txt").write_text(text)
    Trainer(config_of(folder, blocks=3, hidden_dim=32), folder / "heavy").run(lambda report: None)
    leaving = config_of(folder, init=str(folder / "heavy"), early_exit=2, learning_rate=0.003)
    Trainer(leaving, folder / "exit").run(lambda report: None)
    return folder


def config_of(folder, **change):
    options = {"vocab_size": 280, "length": 32, "steps": 30, "batch_size": 4, "dtype": "float32"}
    return TrainConfig(data=str(folder / "texts"), **(options | change))


def some_rows(model, length=32):
    tokens = torch.randint(0, 270, (3, length), generator=torch.Generator().manual_seed(0))
    tokens[:, ::3] = model.spec.mask_id
    return bound.law_of(model, 3, length)(tokens, torch.arange(0, 3 * length, 3))


def test_only_norm_and_head_are_trained_and_stored(runs):
    from safetensors.torch import load_file

    heavy, own = load_file(runs / "heavy" / "model.safetensors"), load_file(runs / "exit" / "model.safetensors")
    assert own.keys() == set(OWN)
    assert not torch.equal(own["output_layer.linear.weight"], heavy["vocab_embed.embedding"])
    assert not torch.equal(own["output_layer.norm_final.weight"], heavy["output_layer.norm_final.weight"])
    whole = read(runs / "exit").parameters
    for name, tensor in whole.items():
        if name not in OWN:
            assert torch.equal(tensor, heavy[name]), name
    assert {name.split(".")[1] for name in whole if name.startswith("blocks.")} == {"0", "1"}
    assert (runs / "exit" / "model.safetensors").stat().st_size < 0.4 * (
        runs / "heavy" / "model.safetensors"
    ).stat().st_size


def test_training_lowers_its_loss_and_leaves_the_body(runs, tmp_path):
    losses = []
    config = config_of(runs, init=str(runs / "heavy"), early_exit=1, learning_rate=0.003, batch_size=32)
    trainer = Trainer(config, tmp_path / "exit")
    trainer.run(lambda report: losses.append(report.loss))
    assert sum(losses[-5:]) < sum(losses[:5])
    body = read(runs / "heavy").parameters
    for name, parameter in trainer.net.named_parameters():
        begun = body["vocab_embed.embedding" if name == "output_layer.linear.weight" else name]
        assert torch.equal(parameter, begun.float()) == (name not in OWN), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_and_alone_it_is_the_same_model(runs, dtype):
    alone = unmask.load(runs / "exit", dtype=dtype)
    sources = {"exit": runs / "exit", "heavy": runs / "heavy"}
    together = unmask.load_all(sources, dtype=dtype)
    assert list(together) == ["exit", "heavy"]
    heavy, light = together["heavy"], together["exit"]
    assert light.embedding is heavy.embedding and light.rope is heavy.rope
    assert light.blocks[0] is heavy.blocks[0]
    for part in ("out", "up", "down"):
        assert getattr(light.blocks[1], part) is getattr(heavy.blocks[1], part)
    assert light.head.weight is not heavy.head.weight
    assert light.spec == alone.spec and light.spec.num_blocks == 2 and light.name == "exit"
    assert torch.equal(some_rows(light), some_rows(alone))
    assert not torch.equal(some_rows(light), some_rows(heavy))


def test_on_the_body_of_another_checkpoint_it_loads_its_own(runs):
    models = unmask.load_all({"heavy": "sotu-heavy", "exit": runs / "exit"})
    assert models["exit"].embedding is not models["heavy"].embedding
    assert torch.equal(some_rows(models["exit"]), some_rows(unmask.load(runs / "exit")))


def test_it_is_the_body_with_another_end(runs):
    heavy, own = read(runs / "heavy"), read(runs / "exit")
    tensors = {name: tensor for name, tensor in heavy.parameters.items() if not name.startswith("blocks.2.")}
    tensors |= {name: own.parameters[name] for name in OWN}
    by_hand = DiT(replace(heavy.spec, num_blocks=2), tensors)
    assert torch.equal(some_rows(by_hand), some_rows(unmask.load(runs / "exit")))


def test_schedules_mix_depths(runs):
    models = unmask.load_all({"heavy": runs / "heavy", "light": runs / "exit"})
    sampler = unmask.Sampler(models, schedule="light:50% heavy:50%", reveal=unmask.Ancestral(8))
    shared = sampler.sample(4, 16, seed=3)
    apart = {name: unmask.load(runs / folder) for name, folder in (("heavy", "heavy"), ("light", "exit"))}
    other = unmask.Sampler(apart, schedule="light:50% heavy:50%", reveal=unmask.Ancestral(8)).sample(4, 16, seed=3)
    assert torch.equal(shared.tokens, other.tokens)
    assert shared.stats.cost.saving.without_head > 0


def test_both_folders_may_move_together(runs, tmp_path):
    for name in ("heavy", "exit"):
        shutil.copytree(runs / name, tmp_path / "elsewhere" / name)
    expected = some_rows(unmask.load(runs / "exit"))
    moved = tmp_path / "elsewhere"
    assert json.loads((moved / "exit" / "config.json").read_text())["body"] == "../heavy"
    assert torch.equal(some_rows(unmask.load(moved / "exit")), expected)
    shutil.rmtree(moved / "heavy")
    for load in (unmask.load, lambda folder: unmask.load_all({"exit": folder})):
        with pytest.raises(
            CheckpointError, match=r"exit is an early exit of another checkpoint: no checkpoint '\.\./heavy'"
        ):
            load(moved / "exit")


def test_behind_a_link_it_finds_its_body(runs, tmp_path):
    """`..` of a folder behind a link is not the one that its path shows."""
    shutil.copytree(runs / "heavy", tmp_path / "heavy")
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "far" / "away")
    exit_folder = tmp_path / "linked" / "exit"
    config = early_exit.describe(tmp_path / "heavy", tmp_path / "heavy", exit_folder, {})
    exit_folder.mkdir()
    assert Path(early_exit.body_of(exit_folder, config)).samefile(tmp_path / "heavy")


def test_another_body_is_refused(runs, tmp_path):
    for name in ("heavy", "exit"):
        shutil.copytree(runs / name, tmp_path / name)
    Trainer(config_of(runs, blocks=3, hidden_dim=32, seed=1, steps=1), tmp_path / "other").run(lambda report: None)
    found = read(tmp_path / "exit")
    with pytest.raises(ValueError, match="an early exit must be one of its own body, got 'exit' for 'other'"):
        unmask.load(tmp_path / "other").leave(found.spec, found.parameters, name=found.name)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "heavy" / "model.safetensors")
    with pytest.raises(CheckpointError, match="belongs to a body with"):
        unmask.load(tmp_path / "exit")


def test_a_body_that_is_replaced_does_not_go_on(runs, tmp_path):
    """Neither when the run is taken up again, nor when it ends."""
    shutil.copytree(runs / "heavy", tmp_path / "heavy")
    config = config_of(runs, init=str(tmp_path / "heavy"), early_exit=2, steps=2)
    Trainer(config, tmp_path / "run").run(lambda report: None)
    trainer = Trainer(replace(config, steps=3), tmp_path / "run")
    Trainer(config_of(runs, blocks=3, hidden_dim=32, seed=1, steps=1), tmp_path / "other").run(lambda report: None)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "heavy" / "model.safetensors")
    with pytest.raises(ValueError, match="init must stay as it is while its exit is trained"):
        trainer.run(lambda report: None)
    with pytest.raises(ValueError, match=r"init must be the checkpoint that the run in .* began with"):
        Trainer(replace(config, steps=4), tmp_path / "run")


def test_a_run_does_not_write_over_what_it_reads(runs, tmp_path):
    shutil.copytree(runs / "heavy", tmp_path / "heavy")
    (tmp_path / "heavy" / "train.json").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "heavy")
    for name in ("init", "teacher"):
        with pytest.raises(ValueError, match=f"out must be another folder than {name}, got"):
            Trainer(config_of(runs, **{name: str(tmp_path / "heavy")}), tmp_path / "link")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("body", None, "body must name"), ("n_blocks", None, "n_blocks must be the number"), ("n_blocks", 9, "missing")],
)
def test_damaged_configurations(runs, tmp_path, key, value, message):
    for name in ("heavy", "exit"):
        shutil.copytree(runs / name, tmp_path / name)
    file = tmp_path / "exit" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        unmask.load(tmp_path / "exit")


def test_a_body_must_have_more_blocks(runs):
    heavy, exit = unmask.load(runs / "heavy"), read(runs / "exit")
    with pytest.raises(ValueError, match="must leave after 1 to 2 blocks, got 3"):
        heavy.leave(replace(exit.spec, num_blocks=3), exit.parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_exit": 3}, "early_exit must leave after 1 to 2 blocks of init, got 3"),
        ({"blocks": 2}, "blocks must be 3, as init has it, or be left out, got 2"),
        ({"length": 64, "early_exit": 1}, "length must be at most the 32 tokens of init, got 64"),
        ({"init": "exit"}, "init must be a whole model that `unmask train` wrote"),
        ({"tokenizer": "other.json"}, "tokenizer must be that of init, sha256:.*, got sha256:"),
    ],
)
def test_options_that_do_not_fit_the_body(runs, tmp_path, change, message):
    if "tokenizer" in change:
        Trainer(config_of(runs, vocab_size=270), tmp_path / "other")
        change = {"tokenizer": str(tmp_path / "other" / "tokenizer.json")}
    change = {name: str(runs / value) if name == "init" else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        Trainer(config_of(runs, **({"init": str(runs / "heavy")} | change)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_the_weights_of_init(runs, tmp_path):
    trainer = Trainer(config_of(runs, init=str(runs / "heavy"), seed=9), tmp_path / "run")
    assert (trainer.config.blocks, trainer.config.hidden_dim) == (3, 32)
    stored = read(runs / "heavy").parameters
    for name, parameter in trainer.net.named_parameters():
        assert torch.equal(parameter, stored[name].float()), name
    Trainer(config_of(runs, init=str(runs / "heavy"), seed=9), tmp_path / "run")  # the sizes may be left out again
