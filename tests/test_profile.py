"""A profile says what the run did: its parts add up, its ticks are those of the plan, its samples those of `sample`."""

import gc
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from toys import Toy, random_dit

from benchmarks import profile_overhead
from unmask import Ancestral, Fixed, LogitsDenoiser, Sampler, cli, load
from unmask.profile import machine, recorder
from unmask.profile import profile as profile_module
from unmask.profile.machine import HighWater, MemoryWatch
from unmask.profile.pieces import pieces
from unmask.profile.profile import Watch, profile, warm_up
from unmask.profile.recorder import NAMES, Recorder
from unmask.profile.result import Profile
from unmask.profile.trace import write_trace
from unmask.profile.view import show
from unmask.progress import Progress

REQUEST = {"num_samples": 5, "length": 24, "seed": 3}
LIGHT = "-m", "sotu-light", "--length", "16", "--reveal", "fixed:8"


@pytest.fixture(scope="module", autouse=True)
def small_ceiling():
    """The large product is a small one here: its rate is nobody's concern."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "SIZE", {"cpu": 64})
        patch.setattr(machine, "SECONDS", 0.001)
        yield


@pytest.fixture(scope="module")
def sampler():
    models = {name: random_dit(name, blocks, hidden=16, mlp=32) for name, blocks in (("heavy", 3), ("light", 1))}
    return Sampler(models, schedule="light:25% heavy:50% light:25%", reveal=Ancestral(8), max_batch=4)


@pytest.fixture(scope="module")
def found(sampler):
    return profile(sampler, REQUEST)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `unmask ARGUMENTS` and gives (exit status, standard output, standard error)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return command


class Interrupting(Progress):
    def __init__(self, after):
        self.left = after

    def update(self, run, tick):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Noting(Progress):
    def __init__(self):
        self.ticks = []

    def update(self, run, tick):
        self.ticks.append(tick)


def test_samples_are_those_of_sample(sampler, found):
    expected = sampler.sample(**REQUEST)
    for one, other in zip(found.samples, expected, strict=True):
        assert one.index == other.index
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.logprobs, other.logprobs)


def test_phases_add_up(found):
    *phases, total = found.phases.values()
    assert list(found.phases)[-1] == "total" and total == found.total > found.stats.seconds["total"]
    assert sum(phases) == pytest.approx(total) and min(phases) > 0
    assert found.phases["body"] + found.phases["attention"] == pytest.approx(found.ticks["body"].sum())
    assert found.phases["head"] == pytest.approx(found.ticks["head"].sum())
    # The run's own clock is read just outside of ours.
    for phase, seconds in (("body", found.ticks["body"].sum()), ("head", found.phases["head"])):
        assert seconds <= found.stats.seconds[phase]


def test_ticks_are_those_of_the_plan_in_their_order(sampler, found):
    planned, noting = sampler.plan(**REQUEST), Noting()
    sampler.sample(**REQUEST, progress=noting)
    expected = [(t.model, len(t.slots), len(t.row_slot), t.lengths.sum()) for t in noting.ticks]
    ticks = found.ticks
    keys = "model", "num_sequences", "num_rows", "num_tokens"
    assert list(zip(*(ticks[key] for key in keys), strict=True)) == expected
    assert {len(column) for column in ticks.values()} == {planned.num_ticks}
    assert sum(ticks["num_rows"]) == planned.num_tokens and sum(ticks["num_sequences"]) == planned.events
    assert sum(ticks["num_sequences"]) / (planned.num_ticks * 4) == found.stats.occupancy
    assert ticks["start"][0] > 0
    assert (ticks["start"][1:] >= (ticks["start"] + ticks["total"])[:-1]).all()
    assert (ticks["body"] + ticks["head"] <= ticks["total"]).all() and (ticks["attention"] < ticks["body"]).all()
    assert ticks["start"][-1] + ticks["total"][-1] < found.total


def test_blocks_of_each_model(found):
    heavy, light = found.model_seconds["heavy"], found.model_seconds["light"]
    assert (len(heavy["blocks"]), len(light["blocks"])) == (3, 1)
    for sums in (heavy, light):
        assert min(sums["blocks"]) > 0 and sums["attention"] < sum(sums["blocks"]) < sums["body"] < sums["total"]
    assert heavy["body"] + light["body"] == pytest.approx(found.ticks["body"].sum())


def test_spans_nest(found):
    times, names = found.times, np.array(NAMES)
    parents = {name: set() for name in NAMES}
    for name, parent in zip(names[times.name], times.parent, strict=True):
        parents[name].add(None if parent < 0 else str(names[times.name[parent]]))
    assert parents["block"] == {"body"} and parents["attention"] == {"block"} and parents["tick"] == {None}
    assert parents["body"] == parents["head"] == {"tick"} and parents["transfer"] == {"plan", "tick", None}
    assert (times.alone >= 0).all()


@pytest.mark.skipif(not machine._RESET.exists(), reason="the peak of resident memory is Linux's to tell")
def test_the_high_water_mark_sees_what_was_let_go():
    gc.collect()  # what earlier tests left must not go meanwhile
    np.ones(128 << 20, np.uint8)  # before the watch begins
    watch = MemoryWatch(torch.device("cpu"))
    np.ones(64 << 20, np.uint8)
    found = watch.read()
    assert 60 << 20 < found.resident_peak - found.resident_before < 100 << 20


def test_rates_memory_and_logits(sampler, found):
    flops = sampler.plan(**REQUEST).cost.total.total
    assert found.flops_per_second == flops / found.total and found.ceiling > 0
    assert found.tokens_per_second == 5 * 24 / found.total
    assert found.steps == [1, 1, 0, 0, 0, 0, 1, 1]
    assert found.logits_bytes_avoided == 4 * 512 * 24 * 5 * 8
    assert found.high_water.device_peak is None
    if found.high_water.resident_peak is not None:
        assert found.high_water.resident_peak >= found.high_water.resident_before > 1 << 20


def test_json(found):
    content = json.loads(json.dumps(found.to_json(2), allow_nan=False))
    assert (content["kind"], content["schema"], content["partial"]) == ("profile", 1, False)
    assert content["request"]["schedule"] == "light:25% heavy:50% light:25%" and content["request"]["seed"] == 3
    assert [model["num_blocks"] for model in content["models"]] == [3, 1]
    assert content["steps"] == {"num_steps": 8, "models": found.steps}
    assert [sample["index"] for sample in content["samples"]] == [0, 1] and content["notes"] == []
    assert content["flops_share"] == content["flops_per_second"] / content["ceiling_flops_per_second"]
    assert content["samples"][0]["pieces"] is None  # no tokenizer


def test_models_without_blocks_say_so():
    toy = Toy(8, 16)
    model = LogitsDenoiser(lambda tokens: torch.sin(tokens[..., None] + torch.arange(8.0)), toy.spec, name="foreign")
    found = profile(Sampler(model, reveal=Fixed(4)), {"num_samples": 2, "length": 8})
    assert found.model_seconds["foreign"]["blocks"] == [] and found.phases["attention"] == 0 < found.phases["body"]
    assert found.logits_bytes_avoided == 0
    assert found.notes[0] == "no blocks or attention are visible in foreign: it counts as body"
    assert "estimated" in found.notes[1]
    json.dumps(found.to_json(1))


def test_interrupted_runs_keep_what_was_done(sampler):
    found = profile(sampler, REQUEST, view=Interrupting(after=3))
    assert found.partial and {len(column) for column in found.ticks.values()} == {3}
    assert found.stats.num_ticks == 3 and len(found.notes) == 1 and found.notes[0].startswith("interrupted")
    assert sum(found.phases.values()) == pytest.approx(2 * found.total)
    json.dumps(found.to_json(1))


def test_interrupted_before_the_first_tick(sampler, monkeypatch):
    monkeypatch.setattr(Watch, "start", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        profile(sampler, REQUEST)


def test_graphs_are_timed_whole_and_divided_by_a_second_run(sampler, monkeypatch):
    monkeypatch.setattr(profile_module, "has_graphs", lambda sampler: True)
    found = profile(sampler, REQUEST)
    first = found.host
    assert found.divided and "second run" in found.notes[0] and not first.are("body").any()
    assert (found.ticks["total"] == first.seconds[first.are("tick")]).all()
    assert (found.ticks["start"] == first.start[first.are("tick")]).all()
    assert len(found.model_seconds["heavy"]["blocks"]) == 3 and min(found.ticks["head"]) > 0
    assert (found.ticks["body"] + found.ticks["head"] < found.ticks["total"] * (1 + 1e-9)).all()
    assert sampler.graphs is None


def test_phases_of_a_gpu_are_those_of_its_own_clock(found, monkeypatch):
    monkeypatch.setattr(Profile, "device", torch.device("cuda"))
    phases = replace(found, divided=True).phases
    assert list(phases) == ["body", "attention", "head", "idle", "total"]
    assert phases["idle"] == pytest.approx(found.total - found.ticks["total"].sum())
    assert phases["head"] == pytest.approx(found.ticks["head"].sum())
    assert found.host_seconds["plan"] == found.times.alone[found.times.are("plan")].sum() > 0
    assert found.host_seconds["capture"] == 0
    screen = StringIO()
    show(replace(found, divided=True, high_water=HighWater(None, None, 3_000_000)), Console(file=screen, width=100))
    shown = screen.getvalue()
    assert "while the GPU works" in shown and "3.0 MB allocated on the GPU" in shown and "resident" not in shown
    assert "Note: ticks were replayed as CUDA graphs" in shown


class Clock:
    """Events of a GPU that is a thousand seconds ahead at each."""

    now = 0

    def __init__(self):
        Clock.now += 1
        self.at = Clock.now

    def elapsed_time(self, later):
        return 1e6 * (later.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(recorder, "_event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return SimpleNamespace(type="cuda")


def test_a_gpu_times_ticks_and_the_host_the_rest(gpu):
    spans = Recorder(gpu)
    with spans("plan"), spans("transfer"):
        pass
    for number in range(2):
        with spans("tick", number), spans("body"), spans("block", 4):
            pass
    times = spans.times()
    assert [NAMES[code] for code in times.name] == ["plan", "transfer"] + ["tick", "body", "block"] * 2
    assert times.seconds[:2].max() < 100 and times.seconds[2:].tolist() == [5000, 3000, 1000] * 2
    assert times.start[2:].tolist() == [1000, 2000, 3000, 7000, 8000, 9000]
    assert times.alone[2:].tolist() == [2000, 2000, 1000] * 2
    assert times.tick.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1] and times.blocks(1) == [0, 0, 0, 0, 1000]


def test_graphs_are_not_timed_inside(gpu):
    spans = Recorder(gpu, inside=False)
    for name in ("tick", "capture", "tick"):
        with spans(name), spans("body"), spans("block"):
            pass
    times = spans.times()
    assert [NAMES[code] for code in times.name] == ["tick", "capture", "tick"] and times.parent.tolist() == [-1] * 3
    assert times.tick.tolist() == [0, -1, 1] and len(spans._events) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("graphs", [None, False])
def test_on_a_gpu(graphs, tmp_path):
    model = load("sotu-light", device="cuda", dtype=torch.bfloat16)
    sampler = Sampler(model, reveal=Ancestral(32), max_batch=4, graphs=graphs)
    request = {"num_samples": 12, "length": 64}
    warm_up(sampler, request)
    found = profile(sampler, request)
    expected = sampler.sample(**request)
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(found.samples, expected, strict=True))
    assert found.divided == (graphs is None) and len(found.model_seconds[model.name]["blocks"]) == 4
    assert sum(found.phases.values()) == pytest.approx(2 * found.total) and min(found.phases.values()) > 0
    assert (np.diff(found.ticks["start"]) > 0).all() and found.host_seconds["plan"] > 0
    assert found.high_water.device_peak > 0
    assert write_trace(sampler, tmp_path / "trace.json", 5, request) == 5
    show(found, Console(file=StringIO()))


def test_pieces_are_the_text():
    tokenizer = load("sotu-light").tokenizer
    text = "Peace – 21 ‰ of “états”, 你好 🙂\n and a byte"
    ids = tokenizer.encode(text).ids
    cut = pieces(ids, tokenizer)
    assert len(cut) == len(ids) and "".join(cut) == text and "" in cut and "🙂" in cut and "�" not in "".join(cut)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(300, (50,), generator=generator).tolist()  # many lone bytes
        cut = pieces(ids, tokenizer)
        assert len(cut) == 50 and "".join(cut) == tokenizer.decode(ids, skip_special_tokens=False)
    assert pieces(ids[:1], tokenizer) == [tokenizer.decode(ids[:1], skip_special_tokens=False)]


def test_warm_up_calls_every_model(sampler, monkeypatch):
    called = []
    for name, model in sampler.models.items():
        hidden = model.hidden
        monkeypatch.setattr(model, "hidden", lambda *a, n=name, h=hidden: called.append(n) or h(*a))
    warm_up(sampler, REQUEST)
    assert called == ["heavy"] * 3 + ["light"] * 3


@pytest.fixture(scope="module")
def events(tmp_path_factory, sampler):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    assert write_trace(sampler, path, 4, REQUEST) == 4
    assert list(path.parent.iterdir()) == [path]
    ranges = json.loads(path.read_text())["traceEvents"]
    return [event for event in ranges if event.get("cat") == "user_annotation"]


class TestTrace:
    def test_holds_every_range(self, events, sampler):
        noting = Noting()
        sampler.sample(**REQUEST, progress=noting)
        models = [tick.model for tick in noting.ticks[:4]]
        heavy, light = models.count(0), models.count(1)
        names = [event["name"] for event in events]
        assert [name for name in names if name.startswith("tick")] == [f"tick {n}" for n in range(4)]
        assert (names.count("heavy"), names.count("light")) == (heavy, light)
        assert names.count("block 0") == 4 and names.count("block 2") == heavy
        assert names.count("attention") == 3 * heavy + light and names.count("head") == 4
        assert {"plan", "transfer", "body"} < set(names)

    def test_ranges_nest(self, events):
        def within(inner, outer):
            return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3

        kinds = "tick", "body", "block", "attention"
        of = {kind: [event for event in events if event["name"].startswith(kind)] for kind in kinds}
        for outer, inner in (("tick", "body"), ("body", "block"), ("block", "attention")):
            assert all(any(within(one, other) for other in of[outer]) for one in of[inner])


class TestCommand:
    def test_prints_and_writes(self, run, tmp_path):
        out, trace = tmp_path / "run.json", tmp_path / "trace.json"
        files = "--out", out, "--trace", trace, "--trace-ticks", 2, "--texts", 1
        status, shown, err = run("profile", *LIGHT, "-n", 2, *files)
        assert status == 0 and "attention" in shown and "never written" in shown and "2 of 8 ticks" in err
        content = json.loads(out.read_text())
        assert content["command"][:2] == ["unmask", "profile"] and len(content["samples"]) == 1
        one = content["samples"][0]
        assert "".join(one["pieces"]) == one["text"] and len(one["pieces"]) == len(one["logprobs"]) == 16
        assert sorted(set(one["reveal_step"])) == list(range(8))
        assert json.loads(trace.read_text())["traceEvents"] and len(list(tmp_path.iterdir())) == 2

    def test_same_request_as_sample(self, run):
        request = *LIGHT, "-n", 3, "--seed", 5, "--prompt", "My <mask:4>", "--temperature", 0.7, "--top-k", 20, "--json"
        status, printed, _ = run("profile", *request, "--texts", 3)
        profiled, sampled = json.loads(printed), json.loads(run("sample", *request)[1])
        assert status == 0 and [one["tokens"] for one in profiled["samples"]] == sampled["tokens"]
        assert profiled["nfe"] == sampled["stats"]["nfe"] and profiled["request"]["temperature"] == 0.7
        assert min(profiled["samples"][0]["reveal_step"]) == -1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--out", "nowhere/run.json"), "out must lie in a folder that exists, got 'nowhere/run.json'"),
            (("--trace", "nowhere/t.json"), "trace must lie in a folder that exists, got 'nowhere/t.json'"),
            (("--out", "."), "out must be a file in a folder that can be written, got '.'"),
            (("--texts", "-1"), "texts must be at least 0, got -1"),
            (("--trace-ticks", "0"), "trace-ticks must be at least 1, got 0"),
            (("--length", "9999"), "9999"),
            (("--device", "tpu"), "device must be cpu, or cuda"),
        ],
    )
    def test_bad_input_is_one_line(self, run, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        status, out, err = run("profile", *LIGHT, *arguments)
        assert (
            (status, out) == (2, "") and err.startswith("unmask: error: ") and err.count("\n") == 1 and message in err
        )
        assert not list(tmp_path.iterdir())

    def test_interrupted(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(Progress, "on_stderr", classmethod(lambda cls: Interrupting(after=3)))
        out, trace = tmp_path / "run.json", tmp_path / "trace.json"
        status, shown, _ = run("profile", *LIGHT, "--out", out, "--trace", trace)
        content = json.loads(out.read_text())
        assert status == 130 and content["partial"] and len(content["ticks"]["model"]) == 3
        assert "Note: interrupted" in shown and not trace.exists()


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (100, True), (40, False)])
def test_view_fits_the_screen(found, width, terminal):
    screen = StringIO()
    show(found, Console(file=screen, width=width, force_terminal=terminal, color_system=None))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= (width if terminal else 100)
    for word in ("attention", "transfer", "heavy", "light", "p20–p80", "FLOP/s", "█ is 4 sequences"):
        assert any(word in line for line in lines)
    assert "…" not in screen.getvalue()


def test_spans_can_be_taken_out_to_measure_them(sampler):
    counting = profile_overhead.Counting()
    expected = sampler.sample(**REQUEST, spans=counting).tokens
    num_spans = counting.num_spans
    with profile_overhead.absent():
        assert torch.equal(sampler.sample(**REQUEST, spans=counting).tokens, expected)
    assert counting.num_spans == num_spans > 0


def test_overhead_is_measured_in_turns(tmp_path, capsys):
    out = tmp_path / "found.json"
    small = "--model", "sotu-light", "-n", "1", "--length", "8", "--steps", "2", "--rounds", "2", "--threads", "1"
    assert profile_overhead.main([*small, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {variant: len(seconds) for variant, seconds in found["seconds"].items()} == {"absent": 2, "off": 2, "on": 2}
    assert found["num_spans"] > 2 * 4 * 2 and min(found["span_seconds"].values()) > 0
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--rounds", "1"), ("--out", "nowhere/found.json")])
def test_overhead_refuses(arguments, capsys):
    with pytest.raises(SystemExit):
        profile_overhead.main(list(arguments))
    assert f"{arguments[0]} must" in capsys.readouterr().err
