"""A case on trial: who is timed, who is not and why, and in what ways."""

import pytest
import torch
from test_benchmark_verify import reseeded, right, unwritten, warm

from benchmarks import memory, trial, variants
from benchmarks.cases import Point
from benchmarks.peers import HEAD_PEERS
from benchmarks.shapes import Shape
from benchmarks.timing import host_clock
from benchmarks.trial import Settings, Timer, captured
from benchmarks.variants import Variant
from benchmarks.verify import Verdict

CPU = torch.device("cpu")
SMALL = Shape(24, 700, 2, 2, 16)


def sampler(name, draw, role="implementation"):
    bind = lambda case: lambda: draw(case.hidden, case.weight, case.keys)  # noqa: E731
    return Variant(name, role, bind, lambda case, draws: variants._sampler(draw, 1, case, draws))


@pytest.fixture
def of(monkeypatch):
    """Opens a trial of these variants."""

    def start(*found, part="whole", count=4, timer=None, **settings):
        monkeypatch.setattr(trial, "implementations", lambda operator, asked: list(found))
        timer = timer or Timer(CPU, Settings(**{"seconds": 0.001, "draws": 20_000, "peers": False} | settings))
        return timer.open(Point("sample_head", part, "small", SMALL, count), torch.float32)

    return start


@pytest.mark.parametrize("part", ["whole", "sampling"])
@pytest.mark.parametrize("draw", [warm, reseeded, unwritten])
def test_a_wrong_implementation_gets_no_speed(draw, part, of):
    found = of(sampler("right", right), sampler("wrong", draw), part=part)
    seconds, _ = found.measure()
    assert set(seconds) == {"right"} and {"cold", "warm"} <= set(seconds["right"])
    assert found.rows["wrong"].law_passed is False and found.rows["right"].law_passed is True
    assert found.rows["wrong"].note == "so its speed is not shown"


def test_a_peer_that_is_off_is_timed_and_said_to_be(of):
    found = of(sampler("warm", warm, role="peer"))
    assert set(found.admitted) == {"warm"} and found.rows["warm"].law_passed is False


def test_what_raises_or_takes_too_long_is_a_row_with_a_note(of):
    def broken(hidden, weight, keys):
        raise RuntimeError("out of luck\nat length")

    slow = sampler("slow", right, role="peer")
    first = of(sampler("broken", broken), slow, limit=1e-9)
    first.measure()
    assert first.rows["broken"].note == "RuntimeError: out of luck" and first.rows["slow"].note is None
    second = of(slow, count=5, timer=first.timer)
    assert not second.admitted and second.rows["slow"].note.startswith("left out: would take")
    assert of(slow, part="sampling", timer=first.timer).admitted  # nothing is known of that


def test_what_lacks_something_says_what(of):
    found = of(Variant("absent", "implementation", None, lacks="needs a GPU"))
    assert found.rows["absent"].note == "needs a GPU" and not found.admitted


def test_runs_are_cold_and_warm_in_turns(of, monkeypatch):
    seen = []
    timer = Timer(CPU, Settings(seconds=1e-9, peers=False))
    timer.flush = lambda: seen.append("flush")

    def logged(name):
        def bind(case):
            return lambda: seen.append(name if case.num_rows > 1 else f"tiny {name}")

        return Variant(name, "part", bind)

    of(logged("A"), logged("B"), timer=timer).measure()
    first = seen.index("flush")
    assert seen[first : first + 6] == ["flush", "tiny A", "A", "flush", "tiny B", "B"]
    assert seen[-2:] == ["A", "A"] or seen[-2:] == ["B", "B"]  # warm: right after the same run


def test_graphs_are_timed_where_they_can_be_captured(of, monkeypatch):
    """The steps of a GPU's benchmark, with the CPU for a device."""

    def capture(run):
        if run is waiting:
            raise RuntimeError("called a synchronizing CUDA operation\nsomewhere")
        return run

    quick, waiting = (lambda: None), (lambda: None)
    replays, notes = captured({"quick": quick, "waiting": waiting}, capture)
    assert replays == {"quick": quick} and notes == {"waiting": "no graph: called a synchronizing CUDA operation"}
    found = of(sampler("quick", right))
    found.device = torch.device("cuda")
    monkeypatch.setattr(trial, "clock", lambda device: host_clock)
    monkeypatch.setattr(trial, "captured", lambda runs: (runs, {"quick": "noted"}))
    seconds, notes = found.measure()
    assert set(seconds["quick"]) == {"cold", "warm", "graph"} and notes == {"quick": "noted"}
    monkeypatch.setattr(trial, "_GRAPH_BELOW", 0)
    assert "graph" not in found.measure()[0]["quick"]


def test_all_that_serves_here_is_timed_with_its_peers():
    timer = Timer(CPU, Settings(seconds=0.001, draws=2000))
    found = timer.open(Point("sample_head", "whole", "small", SMALL, 3), torch.float32)
    able = [each.name for each in variants.implementations("sample_head") if each.lacks is None]
    assert {*able, HEAD_PEERS[0].name, "torch, head alone", "read of the weight (sum)"} <= set(found.measure()[0])
    assert found.rows["read of the weight (sum)"].num_bytes == 700 * 24 * 4
    assert found.rows["torch, head alone"].num_bytes == 4 * (700 * 24 + 3 * 24 + 3 * 700)


def test_an_implementation_on_request_is_timed_when_asked_for(monkeypatch):
    one = variants.registered("add_norm").implementations[-1]
    asked = type(one)("asked", one.run, one.status, on_request=lambda: True)
    monkeypatch.setattr(variants.registered("add_norm"), "implementations", (asked,))
    assert [each.lacks for each in variants.implementations("add_norm")] == ["plain torch, any device"]
    assert [each.lacks for each in variants.implementations("add_norm", frozenset({"asked"}))] == [None]


@pytest.mark.skipif(not memory._RESET.exists(), reason="the peak of resident memory is Linux's to tell")
def test_memory_counts_the_logits_that_a_peer_stores():
    point = Point("sample_head", "whole", "wide", Shape(8, 50_000, 2, 2, 16), 64)
    logits = 4 * 64 * 50_000
    assert 3 * logits < memory.on_cpu(point, torch.float32, HEAD_PEERS[0].name) < 8 * logits


def test_verdicts_are_told_by_the_rows(of):
    variant = Variant("A", "implementation", lambda case: lambda: None, lambda case, draws: Verdict(True, "well"))
    assert of(variant).rows["A"].law == "well"
