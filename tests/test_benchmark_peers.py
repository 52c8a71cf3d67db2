"""Whole runs beside other samplers: adapters, laws, protocols, the result file and the command line."""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import published_forward
import pytest
import torch

from benchmarks import end_to_end, text_law, whole_runs
from benchmarks.end_to_end_report import EndToEndReport, Section, Variant, rows
from benchmarks.network import NETWORKS, random_tensors
from benchmarks.peers import compiled, dream, llada, mdlm, ours
from benchmarks.peers.plain import PlainDiT
from benchmarks.peers.run import Run
from benchmarks.peers.samplers import PEERS, SamplerPeer
from benchmarks.protocol import LatencySample, Paired, middle
from benchmarks.text_law import Laws, check, exact_law
from benchmarks.workloads import WORKLOADS, Size, opening, random_job, sized, workload
from unmask import Ancestral, FirstHitting, Fixed
from unmask.checkpoints import read
from unmask.study.law import output_law

CPU = torch.device("cpu")
SIZE = Size(batch=2, length=8, num_steps=4, num_reveals=8)

# The interfaces of the two samplers that are called as functions, and the laws that they should have.
LLADA = """
import torch
from transformers import AutoModel

def generate(model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id):
    assert (block_length, temperature, remasking, prompt.shape[1]) == (gen_length, 1.0, "random", 0)
    x = torch.full((len(prompt), gen_length), mask_id, device=model.device)
    order = torch.rand(x.shape).argsort(1).argsort(1)
    for step in range(steps):
        drawn = torch.distributions.Categorical(logits=model(x, attention_mask=None).logits.double()).sample()
        x = torch.where(order * steps // gen_length == step, drawn, x)
    return x
"""
DREAM = """
import torch

class DreamGenerationConfig:
    def __init__(self, **options):
        vars(self).update(options)

class DreamGenerationMixin:
    @torch.no_grad()
    def diffusion_generate(self, inputs, config, generation_logits_hook_func):
        assert (config.alg, config.temperature) == ("origin", 1.0)
        x = torch.full((len(inputs), config.max_new_tokens), config.mask_token_id, device=self.device)
        times = torch.linspace(1, config.eps, config.steps + 1)
        for i in range(config.steps):
            logits = self(x, "full", None).logits
            logits = generation_logits_hook_func(i, x, torch.cat([logits[:, :1], logits[:, :-1]], dim=1))
            drawn = torch.distributions.Categorical(logits=logits).sample()
            chance = 1 - times[i + 1] / times[i] if i < config.steps - 1 else 1
            x = torch.where((x == config.mask_token_id) & (torch.rand(x.shape) < chance), drawn, x)
        return x
"""


@pytest.fixture(scope="module")
def tiny():
    return Laws(CPU).job


@pytest.fixture
def eager(monkeypatch):
    """torch.compile that compiles nothing."""
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    monkeypatch.setattr(compiled, "refuses", lambda job: None)


@pytest.fixture
def toy(monkeypatch, eager):
    """A workload that is done at once, by a sampler that needs no checkout."""
    monkeypatch.setitem(WORKLOADS, "toy", {"cpu": SIZE})
    monkeypatch.setattr(text_law, "_RUNS", 2)


def checkout(folder, name, text):
    (folder / name).write_text(text)
    return folder


# --- networks and laws ------------------------------------------------------------------------------------------------


def test_the_plain_network_has_the_published_equations():
    network = NETWORKS["toy"]
    tensors = random_tensors(network, CPU)
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    state = {name: tensor.double() for name, tensor in tensors.items()}
    expected = torch.stack([published_forward.forward(state, each, 2)[1] for each in tokens])
    found = PlainDiT(network, tensors, torch.float64, CPU)(tokens)
    assert (found[:, :, 299] == -torch.inf).all()
    torch.testing.assert_close(found[:, :, :299], expected[:, :, :299], atol=1e-5, rtol=1e-5)


def test_the_bundled_model_in_the_published_layout():
    job = workload("sotu-heavy", Size(1, 16, 4, 16), torch.float32, CPU)
    tokens = opening(job)
    found = job.plain(tokens)[0, :, :2047]
    state = {name: tensor.float() for name, tensor in read("sotu-heavy").parameters.items()}
    expected = published_forward.forward(state, tokens[0], 2)[1][:, :2047]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert job.tensors["blocks.3.adaLN_modulation.bias"].sum() == 2 * 128


def test_the_exact_law_is_that_of_the_study(tiny):
    for reveal in (Ancestral(2), Ancestral(3, (1.0, 0.7, 0.2, 0.1)), FirstHitting()):
        expected = output_law({"dit": tiny.model}, "dit", reveal, 4)[:3, :3, :3, :3]
        assert exact_law(tiny, reveal) == pytest.approx(expected, abs=1e-5)
    assert exact_law(tiny, Fixed(4)) == pytest.approx(exact_law(tiny, FirstHitting()), abs=1e-12)
    assert exact_law(tiny, Fixed(1)) == pytest.approx(exact_law(tiny, Ancestral(1)), abs=1e-12)


@pytest.mark.parametrize("name", ["mdlm-ddpm", "bd3lm-first-hitting", "llada", "dream"])
def test_ours_has_the_law_of_each_peer_and_no_other(tiny, name):
    reveal = PEERS[name].reveal(tiny)
    assert check(ours.prepare(tiny, reveal), tiny, reveal).passed
    for other in (Ancestral(1), Ancestral(2), FirstHitting(), Fixed(2)):
        if abs(exact_law(tiny, other) - exact_law(tiny, reveal)).sum() > 0.1:
            assert not check(ours.prepare(tiny, other), tiny, reveal).passed


def test_texts_with_a_mask_in_them_fail(tiny):
    unfinished = Run(lambda: torch.full((500, 4), tiny.network.mask_id), 1)
    assert check(unfinished, tiny, Fixed(2)).detail == "tokens from 3 to 3 for 3 ids"


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_the_straightforward_loop(tiny, eager):
    run = compiled.prepare(tiny)
    assert run.warm_up() == 2 and check(run, tiny, Ancestral(2)).passed


def test_a_sampler_called_as_llada_is(tiny, tmp_path):
    run = llada.prepare(tiny, checkout(tmp_path, "generate.py", LLADA))
    assert run.warm_up() == 2 and check(run, tiny, Fixed(2)).passed


def test_a_sampler_called_as_dream_is(tiny, tmp_path):
    run = dream.prepare(tiny, checkout(tmp_path, "generation_utils.py", DREAM))
    assert run.warm_up() == 2 and check(run, tiny, dream.reveal(tiny)).passed


def test_nothing_of_a_checkout_stays_imported(tiny, tmp_path):
    import sys

    before = sys.modules.get("transformers")
    llada.prepare(tiny, checkout(tmp_path, "generate.py", LLADA))
    assert "generate" not in sys.modules and sys.modules.get("transformers") is before
    assert str(tmp_path) not in sys.path


def test_samplers_of_one_position_a_call_begin_with_most_positions_given():
    job = random_job(NETWORKS["toy"]._replace(length=8), SIZE._replace(num_reveals=3), torch.float32, CPU)
    run = ours.prepare(job, FirstHitting())
    texts, begin = run.generate(), opening(job)
    assert run.num_reveals == 3 and run.warm_up() == 3 and texts.shape == (2, 8)
    assert (begin[0] == job.network.mask_id).tolist() == [True, *[False] * 5, True, True]
    assert (texts[:, 1:6] == begin[:, 1:6]).all() and (texts != job.network.mask_id).all()
    assert not torch.equal(texts, run.generate())  # another seed


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.checkout])
def test_a_published_sampler_itself(tiny, name):
    peer = PEERS[name]
    variable = f"UNMASK_{peer.checkout.option.upper()}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no copy of its code")
    path = Path(os.environ[variable])
    assert peer.lacks(tiny, path) is None
    run, reveal = peer.prepare(tiny, path), peer.reveal(tiny)
    assert run.warm_up() == {"mdlm-ddpm": 3, "bd3lm-first-hitting": 4, "llada": 2, "dream": 2}.get(name, 3)
    assert check(run, tiny, reveal).passed


def test_what_a_peer_does_not_serve(tiny):
    uneven = SimpleNamespace(size=Size(1, 10, 4, 10))
    assert llada.refuses(uneven) == "its steps must divide the length for a law of ours, got 4 steps and 10 tokens"
    wide = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert "its products are bf16 whatever is asked for" in mdlm.refuses(wide)
    for peer in PEERS.values():
        if peer.checkout:
            assert f"given with --{peer.checkout.option}" in peer.lacks(tiny, None)


# --- protocols --------------------------------------------------------------------------------------------------------


def test_paired_rounds_take_turns_and_each_gives_a_ratio():
    protocol = Paired(rounds=3)
    turns = list(protocol.turns(["A", "B"]))
    assert "".join(turn.name for turn in turns) == "AB" + "AB" + "BA" + "AB"
    assert [turn.timed for turn in turns] == [False] * 2 + [True] * 6
    # A machine that becomes ten times slower; the median of ratios is not the ratio of medians.
    ours_, peer = [1.0, 2.0, 10.0], [2.0, 6.0, 20.0]
    assert protocol.ratio(ours_, peer) == (2.0, *middle([2.0, 3.0, 2.0]))
    assert protocol.ratio([1.0, 1.0], [3.0]) == (3.0, None, None)  # the last round was not finished
    assert protocol.center(peer) == 6.0


def test_latency_sample_is_two_warm_ups_then_the_mean_of_runs_of_one_after_the_other():
    protocol = LatencySample(rounds=2)
    assert [tuple(turn) for turn in protocol.turns(["A", "B"])] == [
        (name, timed) for name in "AB" for timed in (False, False, True, True)
    ]
    ratio = protocol.ratio([1.0, 1.0, 1.0, 1.0], [1.8, 2.2, 1.8, 2.2])
    error = (0.16 / 3) ** 0.5 / 2 / 2
    assert ratio.value == pytest.approx(2.0) and ratio.low * ratio.high == pytest.approx(4.0)
    assert ratio.high == pytest.approx(2 * torch.e ** (1.959964 * error))
    assert protocol.center([1.0, 1.0, 4.0]) == 2.0
    assert protocol.ratio([2.0], [3.0]) == (1.5, None, None)


def timed(name, seconds, ours=None, **changed):
    known = {"sequences": 2, "reveals": 8, "law": "", "law_passed": True, "logits_bytes": 0, "nfe": 1.0}
    return Variant(name, "fixed:4", **{**known, **changed}, ours=ours, seconds=seconds)


def test_a_part_of_the_workload_is_extrapolated():
    mine = timed("unmask", [1.0, 2.0])
    peer = timed("peer", [1.0, 1.0], mine, sequences=1, reveals=4)
    _, row = rows(Section("toy", "cpu", "float32", SIZE, 300, [mine, peer]), Paired())
    assert row["seconds"]["runs"] == [4.0, 4.0] and row["tokens_per_second"] == 4.0
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (3.0, *middle([4.0, 2.0]))
    assert row["note"] == "extrapolated from 1 of 2 sequences and 4 of 8 reveals"
    assert row["tokens_per_second_std"] == row["seconds"]["std"] == 0


def test_peers_stand_under_ours_of_their_law():
    a, b = timed("A", [1.0]), timed("B", [1.0])
    found = rows(
        Section("toy", "cpu", "float32", SIZE, 300, [a, timed("a", [1.0], a), b, timed("z", [2.0], a)]), Paired()
    )
    assert [row["peer"] for row in found] == ["A", "a", "z", "B"]


@pytest.mark.parametrize("failing", ["ours", "peer"])
def test_no_ratio_where_a_law_failed(failing):
    mine = timed("unmask", [1.0], law_passed=failing != "ours")
    peer = timed("peer", [2.0], mine, law_passed=failing != "peer")
    found = rows(Section("toy", "cpu", "float32", SIZE, 300, [mine, peer]), Paired())
    assert all(row["ratio"] is row["ratio_low"] is row["ratio_high"] is None for row in found)


# --- the command ------------------------------------------------------------------------------------------------------

SMALL = ["--workload", "toy", "--device", "cpu", "--threads", "1", "--rounds", "2"]
FIELDS = {
    *("workload", "peer", "role", "device", "dtype", "batch", "length", "num_steps", "reveal", "seconds"),
    *("tokens_per_second", "tokens_per_second_std", "ratio", "ratio_low", "ratio_high", "nfe", "logits_bytes"),
    *("law", "law_passed", "note"),
}


def command(tmp_path, *given):
    """Exit status and results."""
    out = tmp_path / "peers.json"
    status = end_to_end.main([*SMALL, *given, "--out", str(out)])
    return status, json.loads(out.read_text())


def test_the_result_file(toy, tmp_path, capsys):
    path = checkout(tmp_path, "generate.py", LLADA)
    status, found = command(tmp_path, "--peer", "torch-compile,llada", "--peer", "mdlm-ddpm", "--llada", str(path))
    assert status == 0 and not found["partial"] and not found["failures"]
    assert (found["kind"], found["schema"], found["protocol"]["name"]) == ("peers", 1, "paired")
    assert found["command"][:4] == ["python", "-m", "benchmarks", "peers"]
    assert {"machine", "versions", "commit", "date"} <= found.keys()
    assert [(row["peer"], row["role"]) for row in found["rows"]] == [
        ("unmask ancestral:4", "ours"),
        ("torch-compile", "peer"),
        ("unmask fixed:4", "ours"),
        ("llada", "peer"),
    ]
    for row in found["rows"]:
        assert row.keys() == FIELDS and row["seconds"].keys() == {"mean", "std", "median", "p20", "p80", "runs"}
        assert len(row["seconds"]["runs"]) == 2 and row["law_passed"] and row["law"].startswith("χ² p = ")
        assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"]["median"])
        assert (row["ratio"] is None) == (row["role"] == "ours")
    assert [row["nfe"] for row in found["rows"][1:]] == [4, 4, 4] and 2 < found["rows"][0]["nfe"] <= 4
    assert [row["logits_bytes"] for row in found["rows"]] == [0, 4 * 2 * 8 * 300, 0, 8 * 2 * 8 * 300]
    assert found["skipped"] == [
        {
            "peer": "mdlm-ddpm",
            "workload": "toy",
            "reason": "needs a checkout of github.com/kuleshov-group/mdlm, given with --mdlm",
        }
    ]
    shown = capsys.readouterr().err
    assert "toy: mdlm-ddpm is left out: needs a checkout" in shown and "× ours" in shown


def test_seconds_are_those_of_the_clock(toy, tmp_path, monkeypatch):
    ticks = itertools.count(1)
    monkeypatch.setattr(whole_runs, "whole_clock", lambda device: lambda run: float(next(ticks)))
    status, found = command(tmp_path, "--peer", "torch-compile", "--protocol", "latency_sample")
    mine, peer = found["rows"]  # two warm-ups, which no clock sees, and two runs, each
    assert status == 0 and mine["seconds"]["runs"] == [1, 2] and peer["seconds"]["runs"] == [3, 4]
    assert peer["seconds"]["mean"] == 3.5 and peer["seconds"]["std"] == 0.5
    assert peer["tokens_per_second"] == 16 / 3.5 and peer["ratio"] == pytest.approx(3.5 / 1.5)
    assert peer["tokens_per_second_std"] == pytest.approx((16 / 3 - 16 / 4) / 2)


def test_a_peer_that_fails_is_left_out(toy, tmp_path, monkeypatch):
    texts = itertools.count()

    def prepare(job, path):
        if job.size.length == SIZE.length:  # not in the check of its law
            return Run(lambda: [][next(texts)], 1)
        return ours.prepare(job, Fixed(2))

    monkeypatch.setitem(PEERS, "broken", SamplerPeer(prepare, lambda job: Fixed(job.size.num_steps), "none"))
    status, found = command(tmp_path, "--peer", "broken,torch-compile")
    assert status == 0 and found["skipped"][0]["reason"] == "IndexError: list index out of range"
    assert [row["peer"] for row in found["rows"]] == ["unmask fixed:4", "unmask ancestral:4", "torch-compile"]


def test_a_peer_of_another_law_gets_no_ratio(toy, tmp_path, monkeypatch):
    wrong = SamplerPeer(lambda job, path: ours.prepare(job, Ancestral(1)), lambda job: FirstHitting(), "none")
    monkeypatch.setitem(PEERS, "wrong", wrong)
    _, found = command(tmp_path, "--peer", "wrong")
    assert [(row["law_passed"], row["ratio"]) for row in found["rows"]] == [(True, None), (False, None)]


def test_an_interrupted_run_keeps_what_it_measured(toy, tmp_path, monkeypatch, capsys):
    ticks = itertools.count(1)

    def clock(run):
        if next(ticks) > 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(whole_runs, "whole_clock", lambda device: clock)
    status, found = command(tmp_path, "--peer", "torch-compile")
    assert status == 1 and found["partial"]
    assert [len(row["seconds"]["runs"]) for row in found["rows"]] == [1, 2] and found["rows"][1]["ratio"] == 1.0
    assert "interrupted" in (shown := capsys.readouterr().err) and "partial" in shown


def test_a_spent_budget_leaves_one_run_of_each_and_says_what_is_missing(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "narrow", WORKLOADS["toy"])
    now = iter([0.0, 1.0])
    monkeypatch.setattr(end_to_end, "time", SimpleNamespace(monotonic=lambda: next(now, 100.0)))
    monkeypatch.setattr(whole_runs, "time", SimpleNamespace(monotonic=lambda: 100.0))
    status, found = command(tmp_path, "--peer", "torch-compile", "--workload", "narrow", "--budget", "10")
    assert status == 1 and found["failures"] == ["the budget of 10 s was spent before narrow"]
    assert [len(row["seconds"]["runs"]) for row in found["rows"]] == [1, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--peer", "vllm"], f"must be names out of {','.join(PEERS)}, got 'vllm'"),
        (["--workload", "llama"], f"must be names out of {','.join(WORKLOADS)}, got 'llama'"),
        (["--peer", ""], "must be names out of"),
        (["--peer", "mdlm-ddpm,llada"], "no peer to compare with: mdlm-ddpm needs a checkout of github.com/kuleshov-"),
        (
            ["--mdlm", "nowhere"],
            "--mdlm must be a checkout of github.com/kuleshov-group/mdlm, got 'nowhere', which is no folder",
        ),
        (["--length", "300"], "--length must be at most 256 for sotu-heavy, got 300"),
        (["--steps", "0"], "must be a positive integer, got '0'"),
        (["--protocol", "best"], "invalid choice: 'best'"),
        (["--out", "/dev/null/peers.json"], "--out must lie in a folder that exists, got '/dev/null/peers.json'"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
    ],
)
def test_bad_input(given, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        end_to_end.main(["--device", "cpu", "--workload", "sotu-heavy", "--threads", "1", *given])
    assert end.value.code != 0 and said in f"{end.value.code}{capsys.readouterr().err}"


def test_sizes_of_a_workload():
    assert sized("mdlm-small", "cpu", length=4, batch=3) == Size(3, 4, 16, 4)
    assert sized("sotu-heavy", "cpu") == WORKLOADS["sotu-heavy"]["cpu"]


def test_a_grid_is_not_spelled_out(tiny):
    assert whole_runs.label(dream.reveal(tiny)) == "ancestral:2 own grid"
    assert [whole_runs.label(one) for one in (Ancestral(8), FirstHitting())] == ["ancestral:8", "first-hitting"]


def test_a_report_without_rows_is_whole():
    report = EndToEndReport([], {}, Paired())
    assert report.as_dict()["rows"] == [] and report.as_dict()["partial"]


def test_a_run_that_measured_nothing_leaves_the_file_that_stood_there(toy, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_runs.WholeRuns, "set_up", interrupt)
    (tmp_path / "peers.json").write_text('"as it was"')
    assert command(tmp_path, "--peer", "torch-compile") == (1, "as it was")
