"""The benchmarks: the timer's statistics, the law check's teeth, what is counted, the results, the command lines."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import published_forward
import pytest
import torch
from rich.console import Console
from test_structure import ROOT, imports, starts

from benchmarks import gpu_check, memory, sample_head, step, step_report, ticks, trajectory, verify
from benchmarks.cases import SEED, SHAPES, Shape, head_case, head_weight
from benchmarks.ceilings import Ceilings, readers
from benchmarks.machine import command, describe
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
from benchmarks.peers import HEAD_PEERS, flash_sampling_style, mdlm
from benchmarks.report import Report, Row, with_ratios
from benchmarks.samplers import Sampler, head_samplers, operator
from benchmarks.step_report import StepRow
from benchmarks.ticks import OneTick, tick_seconds
from benchmarks.timing import Effort, Flush, Timing, cache_bytes, host_clock, interleave
from unmask import Ancestral, kernels
from unmask import Sampler as OurSampler
from unmask.kernels import dispatch
from unmask.kernels.offsets import Offsets

CPU = torch.device("cpu")
SMALL = Shape(24, 700)
CEILINGS = Ceilings("cpu", "float32", 100, bandwidth=1e9, by="sum", product=1e10)


# --- the timer ------------------------------------------------------------------------------------------------------


class FakeClock:
    """Every run takes the seconds it returns, plus a drift that grows with each measurement."""

    def __init__(self, drift=0.0):
        self.now, self.drift = 0, drift

    def __call__(self, run):
        self.now += 1
        return run() + self.drift * self.now


def test_median_and_percentiles():
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median, timing.p20, timing.p80, timing.rounds) == (3.5, 2.0, 5.0, 6)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        Timing.of([1.0, 0.0])


def test_variants_take_turns_and_the_order_rotates():
    order = []
    variants = {name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}
    interleave(variants, FakeClock(), Effort(warmups=1, min_rounds=1, max_rounds=4, seconds=1e9))
    assert "".join(order) == "ABC" + "ABC" + "BCA" + "CAB" + "ABC"


def test_a_machine_that_slows_down_slows_all_variants():
    found = interleave({name: lambda: 1.0 for name in "ABC"}, FakeClock(drift=1.0), Effort(max_rounds=30, seconds=1e9))
    medians = [timing.median for timing in found.values()]
    assert max(medians) - min(medians) <= 1.0 < max(medians) / 10  # one after the other they would differ by 30


def test_rounds_end_when_the_time_is_spent_but_not_before_the_least():
    effort = Effort(min_rounds=3, max_rounds=10, seconds=4.0)
    assert interleave({"A": lambda: 1.0}, FakeClock(), effort)["A"].rounds == 4
    assert interleave({"A": lambda: 9.0}, FakeClock(), effort)["A"].rounds == 3
    assert interleave({"A": lambda: 0.1}, FakeClock(), effort)["A"].rounds == 10
    assert interleave({}, FakeClock(), effort) == {}


def test_what_comes_before_a_run_is_not_timed():
    seen = []
    interleave({"A": lambda: seen.append("run") or 1.0}, FakeClock(), Effort(0, 1, 1), before=seen.append)
    assert seen == ["A", "run"]


def test_the_flush_is_larger_than_the_cache_and_holds_no_zeros():
    flush = Flush(CPU)
    assert (
        flush.buffer.nbytes >= 2 * cache_bytes(CPU) > 0 and flush.buffer.count_nonzero() > 0.99 * flush.buffer.numel()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readers_run_over_weights(dtype):
    for read in readers(head_weight(SMALL, dtype, CPU)).values():
        read()


# --- who may have a speed -------------------------------------------------------------------------------------------


def right(hidden, weight, keys):
    return kernels.sample_head(hidden, weight, keys=keys, seed=SEED, impl=None).tokens


def warm(hidden, weight, keys):
    return kernels.sample_head(hidden, weight, keys=keys, seed=SEED, temperature=1.1).tokens


def reseeded(hidden, weight, keys):
    return kernels.sample_head(hidden, weight, keys=keys, seed=SEED + 1).tokens


def unwritten(hidden, weight, keys):
    return torch.full((len(hidden),), -1)


def law(draw, part="whole", num_draws=20_000, shape=SMALL):
    return verify.check_law(draw, part, shape, torch.float32, CPU, num_draws)


@pytest.mark.parametrize("part", ["whole", "sampling"])
def test_the_law_check_passes_the_right_sampler_and_refuses_others(part):
    assert law(right, part).passed
    assert not law(warm, part).passed
    assert not law(unwritten, part).passed
    assert not law(lambda hidden, weight, keys: right(hidden, weight, keys).clamp(min=40), part).passed


@pytest.mark.parametrize("part", ["whole", "sampling"])
def test_tokens_must_be_those_of_the_reference(part):
    case = head_case(part, SMALL, head_weight(SMALL, torch.float32, CPU), 40)
    tokens = right(case.hidden, case.weight, case.keys)
    assert verify.check_tokens(case, tokens).passed
    assert not verify.check_tokens(case, reseeded(case.hidden, case.weight, case.keys)).passed
    other = tokens.clone()
    other[-1] = (other[-1] + 1) % SMALL.vocab_size
    assert "row 39" in verify.check_tokens(case, other).detail


@pytest.mark.parametrize("apart", [1, 300])
def test_a_near_tie_is_forgiven(apart):
    """Two ids, of one block or of two, whose scores are equal but for rounding."""
    case = head_case("sampling", SMALL, head_weight(SMALL, torch.float32, CPU), 1)
    ids = [5, 5 + apart]
    case.hidden.fill_(-math.inf)
    if apart == 1:
        gumbel = kernels.noise.token_gumbel(SEED, case.keys, torch.tensor([ids]))
    else:
        gumbel = kernels.noise.block_gumbel(SEED, case.keys, 3)[:, [0, 2]]
    case.hidden[0, ids] = -gumbel[0]
    assert all(verify.check_tokens(case, torch.tensor([token])).passed for token in ids)
    case.hidden[0, ids[0]] += 1e-3
    assert [verify.check_tokens(case, torch.tensor([token])).passed for token in ids] == [True, False]


def test_chi_square_agrees_with_scipy():
    from scipy import stats

    observed, expected = torch.tensor([12.0, 31, 57, 2, 1]), torch.tensor([15.0, 30, 52, 3, 3])
    p = stats.chisquare([12, 31, 57, 3], [15, 30, 52, 6]).pvalue
    assert verify.chi_square(observed, expected) == pytest.approx(p, rel=1e-6)


def test_peers_draw_the_law():
    torch.manual_seed(1)
    for peer in HEAD_PEERS[:3]:
        for part in peer.parts:
            assert law(lambda hidden, weight, keys, peer=peer: peer.draw(hidden, weight), part).passed, peer.name


@pytest.mark.skipif(not dispatch.triton_status()[0], reason=dispatch.triton_status()[1])
def test_the_fused_peer_draws_the_law():
    for temperature in (1.0, 1.3):
        verdict = law(
            lambda hidden, weight, keys, by=temperature: flash_sampling_style(hidden / by, weight),
            num_draws=4_000,
            shape=Shape(24, 200),
        )
        assert verdict.passed == (temperature == 1), verdict.detail


@pytest.fixture
def known_ceilings(monkeypatch):
    monkeypatch.setattr(sample_head, "measure", lambda *arguments: CEILINGS)


def bench(**options):
    arguments = ["--draws", "5000", "--seconds", "0.01", "--threads", "1", "--no-memory", "--rows", "4"]
    report = Report([], {})
    shape = options.pop("shape", SMALL)
    parsed = sample_head._options([*arguments, *(f"--{name}={value}" for name, value in options.items())])
    return sample_head.HeadBench(parsed, CPU, torch.float32, shape, report, Console(quiet=True)), report


@pytest.mark.parametrize("draw", [warm, reseeded, unwritten])
def test_a_wrong_implementation_gets_no_speed(draw, monkeypatch, known_ceilings):
    samplers = [Sampler("right", "implementation", right), Sampler("wrong", "implementation", draw)]
    monkeypatch.setattr(sample_head, "head_samplers", lambda part, device: samplers)
    timer, report = bench(draws=20_000)
    timer.run()
    rows = {(row.part, row.variant): row for row, _ in report.rows}
    for part in ("whole", "sampling"):
        assert rows[part, "right"].cold and rows[part, "right"].warm
        assert rows[part, "wrong"].timing is None and rows[part, "wrong"].law.startswith("FAILS")


def test_what_raises_or_takes_too_long_is_a_row_with_a_note(monkeypatch, known_ceilings):
    def broken(hidden, weight, keys):
        raise RuntimeError("out of luck\nat length")

    samplers = [Sampler("broken", "implementation", broken), Sampler("slow", "peer", right)]
    monkeypatch.setattr(sample_head, "head_samplers", lambda part, device: samplers)
    timer, report = bench(limit=1e-9, rows="4,5")
    timer.run()
    notes = [(row.variant, row.num_rows, row.note) for row, _ in report.rows if row.part == "sampling"]
    assert notes[0] == ("broken", 4, "RuntimeError: out of luck") and notes[1] == ("slow", 4, None)
    assert notes[3][:2] == ("slow", 5) and "left out: would take" in notes[3][2]


def test_graphs_are_timed_where_they_can_be_captured(monkeypatch, known_ceilings):
    """The steps of a GPU's benchmark, with the CPU for a device."""

    capturing = []

    def capture(run):
        capturing.append(True)
        try:
            run()
        finally:
            capturing.pop()
        return run

    def waiting(hidden, weight, keys):
        if capturing:
            raise RuntimeError("called a synchronizing CUDA operation\nsomewhere")
        return right(hidden, weight, keys)

    samplers = [Sampler("quick", "implementation", right), Sampler("waiting", "peer", waiting)]
    monkeypatch.setattr(sample_head, "head_samplers", lambda part, device: samplers)
    monkeypatch.setattr(sample_head, "clock", lambda device: host_clock)
    monkeypatch.setattr(sample_head, "capture", capture)
    timer, report = bench()
    timer.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(verify, "check_law", lambda *arguments: verify.Verdict(True, "lawful"))
    timer.run()
    rows = {row.variant: row for row, _ in report.rows if row.part == "sampling"}
    assert rows["quick"].graph and rows["quick"].timing is rows["quick"].graph
    assert rows["waiting"].graph is None and rows["waiting"].note == "no graph: called a synchronizing CUDA operation"
    assert set(rows["quick"].ratios) == {"cold", "warm"} and rows["quick"].law == "lawful, 4/4 tokens equal"
    report.show(Console(file=(out := io.StringIO()), width=220))
    assert "graph µs" in out.getvalue() and "partial" in out.getvalue()


# --- results --------------------------------------------------------------------------------------------------------


def row(variant, kind, **times):
    timings = {way: Timing(seconds, seconds, seconds, 9) for way, seconds in times.items()}
    return Row(
        "sample_head", "whole", variant, kind, "cpu", "float32", 4, 10, 2, num_bytes=1000, flops=20_000, **timings
    )


def test_shares_and_ratios_by_hand():
    rows = [row("ours", "implementation", cold=4e-6, warm=2e-6), row("theirs", "peer", cold=12e-6, warm=3e-6)]
    ours, theirs = with_ratios(rows)
    assert ours.ratios == {"cold": {"theirs": pytest.approx(3)}, "warm": {"theirs": pytest.approx(1.5)}}
    assert theirs.ratios == {}
    against = ours.against(CEILINGS)
    assert against["floor"] == pytest.approx(2e-6) and against["floor_share"] == pytest.approx(0.5)
    assert against["bandwidth"] == pytest.approx(2.5e8) and against["bandwidth_share"] == pytest.approx(0.25)
    assert against["rate"] == pytest.approx(5e9) and against["rate_share"] == pytest.approx(0.5)
    graphed = replace(ours, graph=Timing(1e-6, 1e-6, 1e-6, 9))
    assert graphed.seconds == 1e-6 and row("untimed", "peer").against(CEILINGS)["bandwidth"] is None


def test_bytes_and_flops_by_hand():
    case = head_case("whole", SMALL, head_weight(SMALL, torch.bfloat16, CPU), 3)
    assert case.num_bytes == 2 * 700 * 24 + 2 * 3 * 24 + 3 * 3 * 8 + 3 * 8 and case.flops == 2 * 3 * 700 * 24
    given = head_case("sampling", SMALL, head_weight(SMALL, torch.bfloat16, CPU), 3)
    assert given.num_bytes == 2 * 3 * 700 + 3 * 3 * 8 + 3 * 8 and given.flops == 0


@pytest.mark.parametrize("num_rows", [1, 8])
def test_inputs_are_neither_zeros_nor_decided(num_rows):
    case = head_case("whole", SMALL, head_weight(SMALL, torch.float32, CPU), num_rows)
    p = (case.hidden @ case.weight.T).softmax(1)
    assert case.hidden.count_nonzero() == case.hidden.numel() and 2 / SMALL.vocab_size < p.max() < 0.9


def test_the_command_writes_its_file_and_table(tmp_path):
    path = tmp_path / "deep" / "out.json"
    size = ["--shape", "24,700", "--rows", "3", "--dtype", "float32", "--threads", "1"]
    effort = ["--draws", "2000", "--seconds", "0.01", "--no-memory"]
    command = [sys.executable, "-m", "benchmarks.sample_head", "--device", "cpu", *size, *effort, "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "whole operator, cpu float32, D = 24, V = 700" in done.stderr
    result = json.loads(path.read_text())
    assert result["schema"] == 1 and not result["partial"] and not result["failures"]
    assert set(result["machine"]) >= {"cpu", "cores", "threads", "gpu", "driver", "load"}
    assert set(result["versions"]) >= {"python", "torch", "triton", "unmask"}
    assert {"commit", "date", "ceilings"} <= set(result)
    assert set(result["ceilings"][0]) == {field.name for field in fields(Ceilings)}
    names = {field.name for field in fields(Row)}
    assert all(set(one) == names | set(row("", "").against(CEILINGS)) for one in result["rows"])
    timed = {(one["part"], one["variant"], one["num_rows"]) for one in result["rows"] if one["cold"]}
    usable = [one.name for one in operator("sample_head").implementations if one.status()[0] and not one.on_request()]
    for part in ("whole", "sampling"):
        assert {(part, name, 3) for name in [*usable, HEAD_PEERS[0].name]} <= timed
    ours = [one for one in result["rows"] if one["kind"] == "implementation" and one["cold"]]
    assert all(one["law"].startswith("χ²") and HEAD_PEERS[0].name in one["ratios"]["warm"] for one in ours)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch, known_ceilings):
    def interrupt(case, ceilings):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_head.HeadBench, "time", lambda self, case, ceilings: interrupt(case, ceilings))
    path = tmp_path / "out.json"
    assert sample_head.main(["--shape", "8,300", "--device", "cpu", "--threads", "1", "--out", str(path)]) == 1
    assert json.loads(path.read_text())["partial"]


def test_a_spent_budget_is_a_failure_in_the_file(tmp_path, known_ceilings):
    path = tmp_path / "out.json"
    options = ["--shape", "8,300", "--dtype", "float32", "--device", "cpu", "--threads", "1", "--budget", "0"]
    assert sample_head.main([*options, "--out", str(path)]) == 1
    result = json.loads(path.read_text())
    assert result["partial"] and "budget of 0 s was spent before whole, R = 1" in result["failures"][0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--rows=1,0", "must be a positive integer, got '0'"),
        ("--shape=llama", "must be D,V or one of mdlm-small, llada-8b, dream-7b, got 'llama'"),
        ("--dtype=int8", "must be names out of float32,bfloat16,float16, got 'int8'"),
        ("--device=tpu", "invalid choice"),
    ],
)
def test_bad_options(option, message, capsys):
    with pytest.raises(SystemExit):
        sample_head.main([option])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_said_in_one_line():
    with pytest.raises(SystemExit, match="--device cuda: torch sees no GPU here"):
        sample_head.main(["--device", "cuda"])
    with pytest.raises(SystemExit, match=r"gpu-check needs an NVIDIA GPU, and torch .* sees none on this machine"):
        gpu_check.main()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is Linux's to tell")
def test_memory_counts_the_logits_that_a_peer_stores():
    shape, num_rows = Shape(8, 50_000), 64
    case = head_case("whole", shape, head_weight(shape, torch.float32, CPU), num_rows)
    logits = 4 * num_rows * shape.vocab_size
    assert 3 * logits < memory.on_cpu(HEAD_PEERS[0].name, case) < 8 * logits


def test_every_shape_and_sampler_has_a_name_of_its_own():
    assert len(set(SHAPES.values())) == len(SHAPES)
    names = [sampler.name for sampler in head_samplers("whole", "cuda")]
    assert len(set(names)) == len(names)
    assert describe(CPU)["versions"]["torch"] == torch.__version__


# --- steps and whole runs -------------------------------------------------------------------------------------------

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
    sampler = OurSampler(model, reveal=Ancestral(1000), max_batch=2)
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
    assert mdlm.CHECKOUT.lacks(tmp_path) == "the checkout given with --mdlm lacks diffusion.py"


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


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        (["--out", "/home/someone/out.json"], ["--out", "out.json"]),
        (["--mdlm=/home/someone/mdlm", "--steps", "3"], ["--mdlm=mdlm", "--steps", "3"]),
        (["--out", "runs/bench/out.json"], ["--out", "runs/bench/out.json"]),
        (["--out", "../../elsewhere/out.json"], ["--out", "out.json"]),
    ],
)
def test_commands_are_recorded_without_the_places_of_files(given, recorded):
    assert command("benchmarks.step", given) == ["python", "-m", "benchmarks.step", *recorded]


# --- the command for a GPU ------------------------------------------------------------------------------------------


def test_stages_fail_and_time_out_without_stopping_the_others(tmp_path, capsys):
    check = gpu_check.Check(tmp_path)
    python = [sys.executable, "-c"]
    assert check.stage("good", [*python, "import os; print(os.environ['FLAG'])"], 20, {"FLAG": "flagged"})
    assert not check.stage("bad", [*python, "print('what was wrong'); raise SystemExit(3)"], 20)
    assert not check.stage("slow", [*python, "import time; time.sleep(60)"], 1)
    record = json.loads((tmp_path / "summary.json").read_text())
    assert [(stage["name"], stage["status"]) for stage in record["stages"]] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("slow", "timed out"),
    ]
    assert not record["ok"]
    assert "flagged" in (tmp_path / "gpu-check.log").read_text() and "what was wrong" in capsys.readouterr().out


def test_the_stages_take_files_and_shapes_that_exist(tmp_path, capsys):
    assert set(gpu_check.SHAPES) == set(SHAPES)
    assert step._options(gpu_check.step(tmp_path)[3:]).steps == 16
    files = [argument for argument in gpu_check.tests() if argument.endswith(".py")]
    assert {f"tests/test_{name}.py" for name in ("sample_head", "noise", "graphs", "dit")} <= set(files)
    check = gpu_check.Check(tmp_path)
    timed = with_ratios([row("ours", "implementation", cold=4e-6), row("theirs", "peer", cold=12e-6)])
    Report([], {}, rows=[(one, CEILINGS) for one in timed]).save(tmp_path / "sample_head-mdlm-small.json")
    timed = step_row("unmask", "implementation", timing=Timing(3e-3, 3e-3, 3e-3, 1), roofline=1e-3)
    step_report.StepReport([], {}, rows=[(timed, CEILINGS)]).save(tmp_path / "step.json")
    gpu_check.summary(check)
    told = [line.split()[2:] for line in capsys.readouterr().out.splitlines()]
    assert told[1] == ["1.00", "0.00", "3.00"] and [float(word) for word in told[3]] == [2.0, 4.0, 12.0]


# --- structure ------------------------------------------------------------------------------------------------------


def test_imports_only_go_down():
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        names = imports(path)
        assert not any(starts(name, top) for name in names for top in ("tests", "engine", "kernels")), path
        optional = {name.split(".")[0] for name in names} & {"triton", "flashinfer", "scipy", "pytest"}
        assert not optional or path.name == "flash_sampling_style.py", f"{path} imports {optional}"
