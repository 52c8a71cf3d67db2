"""The benchmark of steps and whole runs: its arithmetic, its two sides, its rows."""

import json
import os
from dataclasses import fields
from itertools import product
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import published_forward
import pytest
import torch
from measured import CEILINGS

from benchmarks import memory, step, step_report, ticks, trajectory
from benchmarks.network import (
    NETWORKS,
    Pass,
    denoiser,
    half_masked,
    our_passes,
    predicted,
    published_bytes,
    published_passes,
    random_tensors,
)
from benchmarks.peers import mdlm
from benchmarks.step_report import StepRow
from benchmarks.ticks import OneTick, tick_seconds
from benchmarks.timing import Timing, host_clock
from unmask import Ancestral, Sampler
from unmask.kernels.offsets import Offsets

CPU = torch.device("cpu")
TOY = NETWORKS["toy"]


@pytest.mark.parametrize(("num_steps", "length"), [(3, 2), (2, 4), (5, 1)])
def test_events_and_network_calls_by_enumeration(num_steps, length):
    """Every assignment of positions to steps is equally likely."""
    assignments = list(product(range(num_steps), repeat=length))
    events = [len(set(steps)) for steps in assignments]
    assert trajectory.expected_events(num_steps, length) == pytest.approx(mean(events), rel=1e-12)
    assert trajectory.rows_per_event(num_steps, length) == pytest.approx(length / mean(events), rel=1e-12)
    # The published sampler runs its network in the first step and after each that changed something.
    calls = [sum(step == 0 or step - 1 in steps for step in range(num_steps)) for steps in assignments]
    for batch in {1, length}:
        found = trajectory.expected_published_calls(num_steps, length // batch, batch)
        assert found == pytest.approx(mean(calls), rel=1e-4)  # it ends a little before time 0


def test_numbers_of_the_published_setting():
    assert trajectory.expected_events(1000, 1024) == pytest.approx(641, abs=0.1)
    assert trajectory.expected_published_calls(1000, 1024, 8) == pytest.approx(999.7, abs=0.05)
    assert trajectory.published_seconds(1000, 990, call=2.0, cached=0.5, last=3.0) == 990 * 2 + 10 * 0.5 + 3


@pytest.mark.parametrize("itemsize", [2, 4])
def test_our_bytes_and_flops_by_hand(itemsize):
    v, d, blocks, m, batch, num_rows = 300, 32, 2, 128, 3, 4
    tokens = batch * 24
    found = {each.name: each for each in our_passes(TOY, itemsize, batch, num_rows)}
    assert found["products"].num_bytes == itemsize * 2 * (3 * d * d + d * d + 2 * d * m)
    assert found["between"].num_bytes == tokens * blocks * 2 * d * (4 + 4 + 2 * itemsize)
    assert found["head"] == Pass("head", itemsize * v * d, 2 * num_rows * v * d)
    model = denoiser(TOY, random_tensors(TOY, CPU), torch.float32, CPU)
    flops = model.flops(24, 2) + model.flops(24, 1) * 2  # four rows in all
    assert found["products"].flops == flops.blocks and found["attention"].flops == flops.attention


def test_published_bytes_and_flops_by_hand():
    v, d, batch = 300, 32, 3
    tokens, weights = batch * 24, 2 * (4 * d * d + 2 * d * 128)
    found = {each.name: each for each in published_passes(TOY, 2, batch)}
    assert found["products"] == Pass("products", 2 * weights, 2 * tokens * weights)
    assert found["attention"].flops == 2 * 2 * (2 * tokens * 24 * d)
    assert found["head"] == Pass("head", 2 * (v * d + tokens * v), 2 * tokens * v * d)
    assert found["sampling"].num_bytes == tokens * v * 61 and found["sampling"].flops == 0
    assert published_passes(TOY, 4, batch)[-1].num_bytes == tokens * v * 74
    assert published_bytes(TOY, 4, batch) == 16 * tokens * v


def test_passes_come_one_after_the_other():
    passes = [Pass("a", 2000, 0), Pass("b", 1000, 30_000), Pass("c", 0, 10_000)]
    assert predicted(passes, CEILINGS) == pytest.approx(2e-6 + 3e-6 + 1e-6)


def step_row(variant, kind, case="step", batch=8, num_steps=1000, **found):
    passes = [Pass("all", 1000, 20_000)]
    return StepRow(case, variant, kind, "cpu", "float32", batch, 24, num_steps, 4, passes, **found)


def test_ratios_of_steps_runs_and_memory_by_hand():
    once = {seconds: Timing(seconds, seconds, seconds, 3) for seconds in (1.0, 6.0)}
    ours, other, theirs = step_report.with_ratios(
        [
            step_row("unmask", "implementation", timing=once[1.0]),
            step_row("unmask", "implementation", batch=1, timing=once[1.0]),
            step_row("published", "peer", timing=once[6.0]),
        ]
    )
    assert ours.ratios == {"published float32": 6.0} and other.ratios == theirs.ratios == {}
    run = [step_row("unmask", "implementation", "run", timing=once[1.0], calls=650, total=650.0)]
    run += [step_row("published", "peer", "run", timing=once[6.0], calls=1000, total=6500.0)]
    assert step_report.with_ratios(run)[0].ratios == {"published float32": 10.0}
    assert run[0].against(CEILINGS) == {"predicted": pytest.approx(2e-6), "predicted_total": pytest.approx(1.3e-3)}
    weighed = [step_row("unmask", "implementation", "memory", memory=3), step_row("p", "peer", "memory", memory=6)]
    assert step_report.with_ratios(weighed)[0].ratios == {"p float32": 2.0}
    growth = [step_row("unmask", "implementation", "growth", num_steps=n, total=float(n)) for n in (2, 3, 6)]
    assert [row.ratios for row in step_report.with_ratios(growth)] == [{}, {"N = 2": 1.5}, {"N = 2": 3.0, "N = 3": 2.0}]


def test_a_tick_draws_at_masked_positions_of_every_sequence():
    tokens = half_masked(TOY, 3, CPU)
    assert 0.25 < (tokens == TOY.mask_id).double().mean() < 0.75
    tick = OneTick(denoiser(TOY, random_tensors(TOY, CPU), torch.float32, CPU), tokens, 2)
    rows = tick.batch.rows
    assert len(set(rows.tolist())) == 6 and (tokens.flatten()[rows] == TOY.mask_id).all()
    assert (rows == tick.keys[:, 0] * 24 + tick.keys[:, 1]).all()
    drawn, log_probs = tick(), tick.log_probs()
    assert (drawn.tokens != TOY.mask_id).all() and log_probs[:, TOY.mask_id].isneginf().all()
    assert drawn.logprob.tolist() == pytest.approx(log_probs[torch.arange(6), drawn.tokens].tolist(), abs=1e-5)
    assert set(tick.split()) == {"body", "head and sampling"}


def test_a_gpus_tick_draws_the_same_tokens(monkeypatch):
    """Where only the device knows where sequences begin."""
    tokens, model = half_masked(TOY, 3, CPU), denoiser(TOY, random_tensors(TOY, CPU), torch.float32, CPU)
    known = OneTick(model, tokens, 2)
    assert ticks._counts(5, 3, torch.device("meta")).starts.shape == (4,) and ticks._counts(5, 2, CPU) == (5, 5)
    monkeypatch.setattr(ticks, "_counts", lambda size, num, device: Offsets(size * torch.arange(num + 1).int(), size))
    assert torch.equal(OneTick(model, tokens, 2)().tokens, known().tokens)


def test_a_tick_that_cannot_be_captured_is_run_as_it_is(monkeypatch):
    def capture(run):
        raise RuntimeError("called a synchronizing CUDA operation\nsomewhere")

    notes, run = {}, object()
    monkeypatch.setattr(step, "capture", capture)
    assert step._replayed(run, "side", notes) is run
    assert notes == {"side": "no graph: called a synchronizing CUDA operation"}


def test_only_the_first_ticks_of_a_run_are_run():
    model = denoiser(TOY, random_tensors(TOY, CPU), torch.float32, CPU)
    sampler = Sampler(model, reveal=Ancestral(1000), max_batch=2)
    assert len(tick_seconds(sampler, 2, 24, 5)) == 5 and min(tick_seconds(sampler, 2, 24, 5)) > 0
    assert len(tick_seconds(sampler, 1, 3, 5)) <= 2  # a run may be shorter


class PublishedEquations:
    """Stands for the published sampler: its network from published_forward.py, and next to no sampling."""

    def __init__(self, checkout, network, tensors, device):
        assert checkout == Path("checkout")
        self.network, self.tensors = network, tensors

    def log_probs(self, tokens, narrow=False):
        dtype = torch.bfloat16 if narrow else torch.float64
        state = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        logits = [published_forward.forward(state, each, self.network.num_heads)[1] for each in tokens]
        return torch.stack([published_forward.log_probs(each, self.network.mask_id) for each in logits])

    def step(self, tokens, num_steps, narrow, p_x0=None):
        return self.log_probs(tokens, narrow), tokens

    def last(self, tokens, narrow):
        return tokens

    def steps(self, tokens, num_steps, first, count, narrow):
        assert (num_steps, first) == (1000, 500)
        return [host_clock(lambda: self.log_probs(tokens, narrow)) for _ in range(count)]

    def split(self, run):
        return {"all": host_clock(run)}


class Perturbed(PublishedEquations):
    def log_probs(self, tokens, narrow=False):
        return super().log_probs(tokens, narrow) + (0.0 if narrow else 2e-4)


STEP = ["--network", "toy", "--narrow", "toy", "--steps", "3", "--seconds", "0.01", "--threads", "1"]


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Runs the step benchmark beside a stand-in for the published sampler: exit status and results."""
    monkeypatch.setattr(step, "measure", lambda *arguments: CEILINGS)
    monkeypatch.setattr(step, "CHECKOUT", SimpleNamespace(lacks=lambda path: None))
    monkeypatch.setattr(memory, "in_a_process", lambda module, **request: 5 if request["checkout"] else 2)

    def run(published):
        monkeypatch.setattr(step, "Published", published)
        path = tmp_path / "step.json"
        status = step.main([*STEP, "--device", "cpu", "--mdlm", "checkout", "--out", str(path)])
        return status, json.loads(path.read_text())

    return run


def test_both_sides_of_every_case_are_timed(compared):
    status, result = compared(PublishedEquations)
    assert status == 0 and not result["partial"] and result["command"][-1] == "step.json"
    sides = [(row["case"], row["variant"], row["dtype"]) for row in result["rows"]]
    both = [(name, dtype) for name in ("unmask", "published") for dtype in ("float32", "bfloat16")]
    expected = [(case, *side) for case in ("step", "run", "memory") for side in both]
    assert sides == expected + [("growth", "unmask", "float32")] * 3
    names = {field.name for field in fields(StepRow)} | {"predicted", "predicted_total"}
    assert all(set(row) == names for row in result["rows"])
    for row in result["rows"]:
        first = (row["case"], row["num_steps"]) == ("growth", 1000)
        assert bool(row["ratios"]) == (row["variant"] == "unmask" and not first)
        assert row["check"] is None or row["check"].startswith("log-probabilities")
    runs = [row for row in result["rows"] if row["case"] == "run"]
    assert runs[0]["total"] == pytest.approx(runs[0]["calls"] * runs[0]["timing"]["median"])


def test_a_network_that_differs_gets_no_speed(compared):
    status, result = compared(Perturbed)
    assert status == 1 and "so no speed is shown" in result["failures"][0]
    sides = {(row["variant"], row["dtype"]) for row in result["rows"]}
    assert sides == {("unmask", "bfloat16"), ("published", "float32"), ("published", "bfloat16")}


def test_without_a_checkout_ours_is_timed_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "measure", lambda *arguments: CEILINGS)
    path = tmp_path / "step.json"
    assert step.main([*STEP, "--device", "cpu", "--cases", "step,run", "--out", str(path)]) == 0
    assert "the published sampler is left out: needs a checkout" in capsys.readouterr().err
    assert {row["variant"] for row in json.loads(path.read_text())["rows"]} == {"unmask"}


def test_what_a_checkout_lacks_is_said(tmp_path):
    assert "given with --mdlm" in mdlm.CHECKOUT.lacks(None)
    assert mdlm.CHECKOUT.lacks(tmp_path).endswith(f"got {str(tmp_path)!r}, which lacks diffusion.py")


def test_attention_and_rotation_in_place_of_flash_attention():
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64)
    angles = torch.arange(5)[:, None] * 10_000 ** (-torch.arange(4) / 4)
    turned = mdlm.rotate(qkv.clone(), angles.cos().double(), angles.sin().double())
    for part in range(3):
        for sequence, head in product(range(2), repeat=2):
            plain = qkv[sequence, :, part, head]
            expected = plain if part == 2 else published_forward.rotary(plain)
            torch.testing.assert_close(turned[sequence, :, part, head], expected, atol=1e-6, rtol=0)
    attended = mdlm.attend(turned.flatten(0, 1), None, 5, 0.0, False)
    query, key, value = (turned[1, :, part, 0] for part in range(3))
    torch.testing.assert_close(attended[5:, 0], (query @ key.T / 8**0.5).softmax(-1) @ value)


@pytest.mark.skipif("UNMASK_MDLM" not in os.environ, reason="UNMASK_MDLM names no checkout of kuleshov-group/mdlm")
def test_the_published_sampler_itself():
    published = mdlm.Published(Path(os.environ["UNMASK_MDLM"]), TOY, tensors := random_tensors(TOY, CPU), CPU)
    tokens = half_masked(TOY, 2, CPU)
    found = published.log_probs(tokens)
    expected = PublishedEquations(Path("checkout"), TOY, tensors, CPU).log_probs(tokens)
    masked, real = tokens == TOY.mask_id, slice(TOY.mask_id)
    torch.testing.assert_close(found[masked][:, real], expected[masked][:, real].float(), atol=1e-4, rtol=0)
    assert len(published.steps(tokens, 1000, 500, 3, narrow=False)) == 3
    p_x0, after = published.step(tokens, 1000, narrow=False)
    assert (after == tokens)[~masked].all() and p_x0.shape == (2, 24, 300)
    parts = published.split(lambda: published.step(tokens, 1000, narrow=True))
    assert set(parts) == {"body", "head", "sampling"} and min(parts.values()) > 0
