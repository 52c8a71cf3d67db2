"""Losses, gaps and divergences by mask rate, against laws written out in fp64."""

import json

import numpy as np
import pytest
import torch
from toys import MASK, Toy, random_dit

from unmask import LogitsDenoiser, cli
from unmask.denoiser import Batch
from unmask.study import bootstrap, plots
from unmask.study.importance import importance, masks_of_bin, num_batches

VOCAB, LENGTH = 9, 12


class Scaled(Toy):
    """The toy's logits times a number: a flatter or sharper opinion about the same tokens."""

    def __init__(self, scale, vocab_size=VOCAB, max_length=LENGTH):
        super().__init__(vocab_size, max_length)
        self.scale = scale

    def logits(self, batch: Batch):
        return super().logits(batch) * self.scale


def text(num, length=LENGTH, vocab_size=VOCAB, mask_id=MASK, seed=0):
    ids = np.delete(np.arange(vocab_size), mask_id)
    return np.random.default_rng(seed).choice(ids, (num, length))


def by_hand(models, windows, bins, seed):
    """The same masks; all laws in fp64, with logits: (losses, kl) of each bin, nats per masked token."""
    found = []
    for index in range(bins):
        masks = masks_of_bin(*windows.shape, index, bins, np.random.default_rng([seed, bins, index]))
        rows = torch.from_numpy(np.flatnonzero(masks))
        tokens = torch.from_numpy(np.where(masks, MASK, windows)).flatten()
        num, length = windows.shape
        counts = tuple(masks.sum(1).tolist())
        batch = Batch(tokens, (length,) * num, rows, counts, torch.from_numpy(masks.mean(1).astype(np.float32)))
        logits = [model.logits(batch).double().index_fill(1, torch.tensor([MASK]), -torch.inf) for model in models]
        logs = [each.log_softmax(1) for each in logits]
        targets = torch.from_numpy(windows).flatten()[rows]
        losses = [-each.gather(1, targets[:, None]).mean().item() for each in logs]
        real = torch.arange(VOCAB) != MASK
        kl = [(logs[0].exp() * (logs[0] - each))[:, real].sum(1).mean().item() for each in logs[1:]]
        found.append((losses, kl))
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_values_are_those_of_the_laws_written_out(batch_size):
    models = {"sharp": Scaled(1.5), "flat": Scaled(0.5), "none": Scaled(0.0)}
    windows = text(20)
    found = importance(models, windows, bins=4, seed=3, batch_size=batch_size)
    assert found.models == ("sharp", "flat", "none") and [one.high for one in found.bins] == [0.25, 0.5, 0.75, 1.0]
    for one, (losses, kl) in zip(found.bins, by_hand(list(models.values()), windows, 4, 3), strict=True):
        assert [one.loss[name].value for name in models] == pytest.approx(losses, abs=1e-5)
        assert [one.kl[name].value for name in ("flat", "none")] == pytest.approx(kl, abs=1e-5)
        gaps = [one.gap[name].value for name in ("flat", "none")]
        assert gaps == pytest.approx([losses[1] - losses[0], losses[2] - losses[0]], abs=1e-5)
        assert one.loss["none"].value == pytest.approx(np.log(VOCAB - 1), abs=1e-5)


def test_a_head_with_weights_gives_what_its_logits_give():
    """A transformer through its head, and the same one as a foreign model that returns logits."""
    dit = random_dit("dit", 2, vocab_size=60, hidden=32, length=16)

    def logits(tokens):
        from unmask.workspace import Workspace

        num, length = tokens.shape
        every = torch.arange(tokens.numel())
        batch = Batch(tokens.flatten(), (length,) * num, every, (length,) * num, torch.ones(num))
        hidden = dit.hidden(batch, Workspace([dit.buffers(tokens.numel(), tokens.numel(), num)]))
        result = hidden @ dit.head.weight.T
        return (result if dit.head.bias is None else result + dit.head.bias).view(num, length, -1)

    foreign = LogitsDenoiser(logits, dit.spec)
    other = random_dit("other", 1, vocab_size=60, hidden=32, length=16, seed=1)
    windows = text(9, 16, 60, mask_id=59)
    one = importance({"dit": dit, "other": other}, windows, bins=3)
    same = importance({"foreign": foreign, "other": other}, windows, bins=3)
    for ours, theirs in zip(one.bins, same.bins, strict=True):
        assert ours.loss["dit"].value == pytest.approx(theirs.loss["foreign"].value, abs=1e-4)
        assert ours.kl["other"].value == pytest.approx(theirs.kl["other"].value, abs=1e-4)


def test_a_model_beside_itself_has_no_gap():
    found = importance({"a": Toy(VOCAB, LENGTH), "b": Toy(VOCAB, LENGTH)}, text(10), bins=3)
    for one in found.bins:
        assert one.gap["b"] == (0, 0, 0) and one.kl["b"] == (0, 0, 0)
        assert one.loss["a"] == one.loss["b"] and one.loss["a"].low < one.loss["a"].value < one.loss["a"].high


@pytest.mark.parametrize(("length", "bins"), [(12, 4), (12, 12), (10, 3), (7, 5), (1, 1)])
def test_masks_cover_the_rates_of_their_bin_evenly(length, bins):
    seen = []
    for index in range(bins):
        masks = masks_of_bin(400, length, index, bins, np.random.default_rng(index))
        counts = np.bincount(masks.sum(1), minlength=length + 1)
        used = np.flatnonzero(counts)
        assert (used * bins > index * length).all() and (used * bins <= (index + 1) * length).all()
        assert counts[used].max() - counts[used].min() <= 1  # as even as a division allows
        seen += used.tolist()
        for number in used:  # and every position as often as another, up to chance
            share = masks[masks.sum(1) == number].mean(0)
            assert np.abs(share - number / length).max() < 5 * np.sqrt(0.25 / counts[number]) + 1e-12
    assert seen == list(range(1, length + 1))


def test_a_bin_does_not_depend_on_the_batch_or_the_draws_before():
    models = {"sharp": Scaled(1.5), "flat": Scaled(0.5)}
    one = importance(models, text(20), bins=3, batch_size=5)
    assert importance(models, text(20), bins=3, batch_size=20).bins[2].num_tokens == one.bins[2].num_tokens
    twice, calls = importance(models, text(20), bins=3, draws=2, batch_size=5, on_batch=lambda: None), []
    assert twice.bins[0].num_tokens > one.bins[0].num_tokens
    importance(models, text(20), bins=3, draws=2, batch_size=7, on_batch=lambda: calls.append(1))
    assert len(calls) == num_batches(20, 3, 2, 7) == 18


def test_bootstrap_intervals_are_those_of_resampling():
    """Against a loop over resamples; and they hold the truth about as often as they say."""
    rng = np.random.default_rng(5)
    sums, counts = rng.normal(3, 1, 30) * 10, np.full(30, 10.0)
    drawn = bootstrap.resamples(30, 500, seed=1)
    assert (drawn.sum(1) == 30).all()
    ratios = []
    for row in drawn.astype(int):
        units = np.repeat(np.arange(30), row)
        ratios.append(sums[units].sum() / counts[units].sum())
    interval = bootstrap.of_ratio(sums, counts, drawn)
    assert interval == pytest.approx((sums.sum() / 300, *np.quantile(ratios, (0.025, 0.975))))
    held = 0
    drawn = bootstrap.resamples(60, 400)
    for _ in range(400):
        counts = rng.integers(1, 20, 60).astype(float)
        one = bootstrap.of_ratio(counts * rng.normal(2, 1, 60), counts, drawn)
        held += one.low < 2 < one.high
    assert 0.90 < held / 400 < 0.98


BAD = {
    "one model": (lambda: importance({"a": Toy(9, 12)}, text(3)), "models must be at least two to compare, got a"),
    "vocabularies": (lambda: importance({"a": Toy(9, 12), "b": Toy(8, 12)}, text(3)), "must share vocab_size"),
    "no window": (lambda: importance({"a": Toy(9, 12), "b": Toy(9, 12)}, text(0)), r"got shape \[0, 12\]"),
    "too long": (lambda: importance({"a": Toy(9, 8), "b": Toy(9, 12)}, text(3)), "at most the 8 tokens .* got 12"),
    "bins": (lambda: importance({"a": Toy(9, 12), "b": Toy(9, 12)}, text(3), bins=13), "from 1 to the 12 .* got 13"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


# ---- The command ----


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in range(12):
        (folder / f"{name}.txt").write_text(f"Fellow citizens of the Senate, message {name}. " * 30)
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["unmask", "study", "importance", *map(str, arguments)])
    cli.main()


def test_the_command_writes_table_json_and_plots(corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found"
    options = ("--data", corpus, "--heldout-share", 0.3, "--length", 32, "--windows", 3, "--bins", 2)
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *options, "--out", out)
    assert left.value.code == 0
    table = capsys.readouterr().out
    assert "KL(heavy ‖ light)" in table and "0.000–0.500" in table and max(map(len, table.splitlines())) <= 80
    saved = json.loads((out / "importance.json").read_text())
    assert saved["models"] == ["heavy", "light"] and len(saved["bins"]) == 2
    assert saved["bins"][0]["kl"]["light"]["value"] > 0
    assert (out / "importance.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
        out / "importance.svg"
    ).read_text()
    with pytest.raises(SystemExit):
        run(monkeypatch, *options, "--json")
    assert {**json.loads(capsys.readouterr().out), "date": saved["date"]} == saved
    assert saved["kind"] == "importance" and saved["versions"]["torch"] == torch.__version__
    assert saved["identities"]["heavy"]["dtype"] == "float32"
    with pytest.raises(SystemExit):
        run(monkeypatch, *options, "--dtype", "bfloat16", "--json")
    narrow = json.loads(capsys.readouterr().out)
    assert narrow["identities"]["heavy"]["dtype"] == "bfloat16"
    assert 0 < abs(narrow["bins"][0]["gap"]["light"]["value"] - saved["bins"][0]["gap"]["light"]["value"]) < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--windows", 0), "windows must be at least 1, got 0"),
        (("--model", "a=sotu-heavy"), "models must be at least two to compare, got a"),
        (("--model", "a=sotu-heavy", "--model", "a=sotu-light"), "model names must differ, got a, a"),
        (("--length", 100_000), "length must not exceed the text"),
        (("--data", "nowhere"), "data must be a folder"),
    ],
)
def test_bad_options_are_a_line(arguments, message, corpus, monkeypatch, capsys):
    given = arguments if "--data" in arguments else ("--data", corpus, *arguments)
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *given)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_file_in_the_place_of_out_is_an_error(corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--data", corpus, "--out", tmp_path / "file")
    assert "out must be a folder" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_begun(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"plots need matplotlib: pip install 'unmask\[study\]'"):
        plots.check_installed()
