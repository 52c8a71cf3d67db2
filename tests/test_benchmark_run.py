"""The command that times operators: its files and tables, its options, what is left when it is stopped."""

import csv
import io
import json
import re
from dataclasses import fields

import pytest
import torch
from measured import CEILINGS, row
from rich.console import Console

from benchmarks import __main__ as dispatcher
from benchmarks import liger, run, variants, verify
from benchmarks.cases import operators
from benchmarks.ceilings import Ceilings
from benchmarks.machine import command, describe
from benchmarks.operator_report import OperatorReport
from benchmarks.peers import HEAD_PEERS
from benchmarks.results import read_rows
from benchmarks.rows import Row, with_ratios
from benchmarks.timing import Timing
from benchmarks.variants import implementations

CPU = torch.device("cpu")
SIZE = ["--shape", "24,700,2,16", "--rows", "3", "--sequences", "1", "--dtype", "float32", "--device", "cpu"]
QUICK = [*SIZE, "--threads", "1", "--draws", "2000", "--seconds", "0.001", "--no-memory"]


@pytest.fixture
def known_ceilings(monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *arguments: CEILINGS)


def test_shares_and_ratios_by_hand():
    ours, theirs, reference = with_ratios(
        [
            row("ours", times={"cold": 4e-6, "warm": 2e-6}),
            row("theirs", "peer", times={"cold": 12e-6, "warm": 3e-6}),
            row("reference", times={"cold": 8e-6}),
        ]
    )
    assert ours.ratios["cold"] == {"theirs": pytest.approx(3), "reference": pytest.approx(2)}
    assert ours.ratios["warm"] == {"theirs": pytest.approx(1.5)}
    assert theirs.ratios == {} and reference.ratios == {"cold": {"theirs": pytest.approx(1.5)}}
    against = ours.against(CEILINGS)
    assert against["floor"] == pytest.approx(2e-6) and against["floor_share"] == pytest.approx(0.5)
    assert against["bandwidth"] == pytest.approx(2.5e8) and against["bandwidth_share"] == pytest.approx(0.25)
    assert against["rate"] == pytest.approx(5e9) and against["rate_share"] == pytest.approx(0.5)
    assert row("ours", times={"cold": 4e-6, "graph": 1e-6}).seconds == 1e-6
    assert row("untimed", "peer").against(CEILINGS)["bandwidth"] is None


def test_the_command_writes_its_files_and_tables(tmp_path, capsys, known_ceilings):
    assert dispatcher.main(["run", *QUICK, "--out", str(tmp_path / "deep")]) == 0
    out, told = capsys.readouterr()
    assert out == "" and "sample_head: whole operator; 24,700,2,16 (D = 24, V = 700), cpu float32" in told
    result, rows = read_rows(tmp_path / "deep" / "operators.json")
    assert (result["kind"], result["schema"], result["partial"], result["failures"]) == ("operators", 1, False, [])
    assert result["command"][:4] == ["python", "-m", "benchmarks", "run"] and result["command"][-1] == "deep"
    assert set(result["machine"]) >= {"cpu", "cores", "threads", "gpu", "driver", "load"}
    assert set(result["versions"]) >= {"python", "torch", "triton", "unmask"}
    assert {"commit", "date"} <= set(result)
    assert set(result["ceilings"][0]) == {field.name for field in fields(Ceilings)}
    names = {field.name for field in fields(Row)}
    assert all(set(one) == names | set(row("").against(CEILINGS)) for one in result["rows"])
    timed = {(each.operator, each.implementation) for each in rows if each.timings["cold"] and each.timings["warm"]}
    able = {(name, one.name) for name in operators() for one in implementations(name) if one.lacks is None}
    assert able | {("sample_head", HEAD_PEERS[0].name)} <= timed
    for each in rows:
        assert each.law_passed or each.role not in ("implementation", "peer") or each.timing is None
    ours = next(one for one in result["rows"] if one["operator"] == "sample_head" and one["implementation"] == "cpu")
    assert ours["law"].startswith("χ²") and HEAD_PEERS[0].name in ours["ratios"]["warm"]


def test_results_are_csv_for_the_visualiser(tmp_path):
    report = OperatorReport([], describe(CPU))
    timed = row("cpu", times={"cold": 4e-3, "warm": 2e-3}, spread=0.5, memory=3 << 20)
    report.rows = [(timed, CEILINGS), (row("triton"), CEILINGS)]
    liger.write(tmp_path / "operators.csv", report)
    cold, warm, memory = csv.DictReader(io.StringIO((tmp_path / "operators.csv").read_text()))
    assert list(cold) == [
        *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label"),
        *("x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp"),
        "liger_version",
    ]
    assert cold["kernel_name"] == "sample_head-whole-bundled-float32" and cold["kernel_provider"] == "cpu"
    assert (cold["kernel_operation_mode"], cold["metric_name"], cold["metric_unit"]) == ("cold", "speed", "ms")
    assert [float(cold[f"y_value_{point}"]) for point in (50, 20, 80)] == [4.0, 2.0, 6.0]
    assert (warm["kernel_operation_mode"], float(warm["y_value_50"])) == ("warm", 2.0)
    assert (memory["metric_name"], memory["kernel_operation_mode"]) == ("memory", "full")
    assert float(memory["y_value_50"]) == 3.0 and (cold["x_name"], cold["x_label"], cold["x_value"]) == (
        "R",
        "rows",
        "2",
    )
    config = {"hidden_size": 4, "vocab_size": 10, "dtype": "float32"}  # the same for all rows of a plot
    assert json.loads(cold["extra_benchmark_config_str"]) == config
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", cold["timestamp"])


@pytest.mark.parametrize("width", [120, 160, 200])
def test_tables_fit_their_terminal(width):
    times = {"cold": 1.2345678, "warm": 1.1, "graph": 0.9}
    rows = [row("torch, published chain", "peer", times=times, law="χ² p = 0.5", law_passed=True)]
    rows += [row("cpu", times=times, law="χ² p = [0.00001]", law_passed=True, memory=10**9)]
    report = OperatorReport([], {}, rows=[(each, CEILINGS) for each in with_ratios(rows)])
    console = Console(file=io.StringIO(), width=width)
    report.show(console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    assert any("[0.00001]" in line for line in lines)
    head = next(line for line in lines if "variant" in line)
    assert all(name in head for name in ("cold µs", "warm µs", "of floor", "× published", "law and notes"))
    assert ("p20–p80" in head and "× cold" in head) == (width == 200)


def test_a_check_that_fails_is_a_failure(tmp_path, monkeypatch, known_ceilings, capsys):
    monkeypatch.setattr(variants, "_agrees", lambda impl, case, draws: verify.Verdict(impl != "cpu", "off"))
    variants._implementation.cache_clear()
    asked = ["--operator", "add_norm", "--case", "plain", "--out", str(tmp_path)]
    assert run.main([*QUICK, *asked]) == 1
    variants._implementation.cache_clear()
    result, rows = read_rows(tmp_path / "operators.json")
    assert result["failures"] == ["add_norm plain 24,700,2,16 R=3 float32: cpu fails its check: off"]
    assert {each.implementation for each in rows if each.timing} == {
        "reference"
    } and "FAILS: off" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch, known_ceilings):
    whole = run.Bench.rows

    def interrupted(self, point, trials):
        if point.operator == "attention":
            raise KeyboardInterrupt
        return whole(self, point, trials)

    monkeypatch.setattr(run.Bench, "rows", interrupted)
    assert run.main([*QUICK, "--operator", "add_norm,attention", "--out", str(tmp_path)]) == 1
    result, rows = read_rows(tmp_path / "operators.json")
    assert result["partial"] and {each.operator for each in rows} == {"add_norm"}
    assert (tmp_path / "operators.csv").read_text().count("add_norm-plain") > 1


def test_what_fails_in_one_case_does_not_stop_the_others(tmp_path, monkeypatch, known_ceilings):
    def fails(self, point, trials):
        raise MemoryError

    monkeypatch.setattr(run.Bench, "rows", fails)
    assert run.main([*QUICK, "--operator", "add_norm", "--out", str(tmp_path)]) == 1
    failures = json.loads((tmp_path / "operators.json").read_text())["failures"]
    assert [failure.split()[1] for failure in failures] == ["plain", "modulated"] and "MemoryError" in failures[0]


def test_what_was_read_faster_than_the_ceiling_raises_it(tmp_path, monkeypatch, known_ceilings):
    read = row("read", "ceiling", times={"cold": 1e-7})  # 1000 bytes: ten times the ceiling
    monkeypatch.setattr(run.Bench, "rows", lambda self, point, trials: [row("cpu", times={"cold": 1e-6}), read])
    assert run.main([*QUICK, "--operator", "add_norm", "--case", "plain", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "operators.json").read_text())["rows"]
    assert [each["bandwidth_share"] for each in found] == [pytest.approx(0.1), pytest.approx(1.0)]


def test_a_spent_budget_is_a_failure_in_the_file(tmp_path, known_ceilings):
    assert run.main([*QUICK, "--operator", "sample_head", "--budget", "0", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "operators.json").read_text())
    assert result["partial"] and result["failures"][0].startswith(
        "the budget of 0 s was spent before sample_head whole"
    )


def test_cases_are_listed_by_name(capsys):
    assert run.main([*SIZE, "--operator", "sample_head,attention", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "sample_head whole 24,700,2,16 R=3",
        "sample_head sampling 24,700,2,16 R=3",
        "attention full 24,700,2,16 B=1",
        "attention rows 24,700,2,16 B=1",
    ]
    assert run.main([*SIZE, "--case", "sampling", "--case", "add_norm plain", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["add_norm", "sample_head"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--rows=1,0"], "must be a positive integer, got '0'"),
        (["--shape=llama"], "must be one of mdlm-small, llada-8b, dream-7b, bundled, or D,V,H,L, got 'llama'"),
        (["--shape=24,700,5,16"], "must have an even number of columns for each of 5 heads"),
        (["--dtype=int8"], "must be names out of float32,bfloat16,float16, got 'int8'"),
        (["--device=tpu"], "invalid choice"),
        (["--operator=sampel"], "must be names out of add_norm,attention,divergence,expected_embedding,sample_head"),
        (["--impl=gpu"], "must be names out of triton,cpu,reference,sdpa,cuda, got 'gpu'"),
    ],
)
def test_bad_options_list_the_good_ones(option, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(option)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--case", "nope"], r"--case: no case has all the words 'nope'; they have: add_norm, plain, .*, R=3, "),
        (
            ["--operator", "add_norm", "--impl", "sdpa"],
            "--impl sdpa: there is nothing to time: add_norm has triton, ",
        ),
    ],
)
def test_an_empty_selection_is_an_error(options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run.main([*SIZE, *options])


def test_results_need_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"--out must be a folder, got .*: .*file is a file"):
        run.main([*QUICK, "--out", str(tmp_path / "file" / "below")])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_said_in_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="--device cuda: torch sees no GPU here"):
        run.main(["--device", "cuda"])
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match=r"--impl triton: none can run here: triton: Triton is "):
        run.main(["--device", "cpu", "--impl", "triton"])


def test_the_dispatcher_knows_its_commands(capsys):
    assert dispatcher.main([]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in dispatcher.COMMANDS)
    with pytest.raises(SystemExit, match="the command must be one of run, compare, peers, greedy, got 'time'"):
        dispatcher.main(["time"])


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


def test_timings_survive_their_file(tmp_path):
    timed = row("cpu", times={"cold": 4.0}, spread=0.25, law_passed=True)
    OperatorReport([], describe(CPU), rows=[(timed, CEILINGS)]).save(tmp_path / "out.json")
    _, (found,) = read_rows(tmp_path / "out.json")
    assert found.timings == {"cold": Timing(4.0, 3.0, 5.0, 9), "warm": None, "graph": None}
    assert found.key == timed.key
