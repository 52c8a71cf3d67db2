"""The command for a machine with a GPU: its stages, and what it tells in the end."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from measured import CEILINGS, row

from benchmarks import gpu_check, greedy, selection, step, step_report
from benchmarks.end_to_end import CHECKOUTS
from benchmarks.models import SHAPES
from benchmarks.network import Pass
from benchmarks.operator_report import OperatorReport
from benchmarks.step_report import StepRow
from benchmarks.timing import Timing


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_said_in_one_line():
    with pytest.raises(SystemExit, match=r"gpu-check needs an NVIDIA GPU, and torch .* sees none on this machine"):
        gpu_check.main()


def test_the_stages_take_files_and_shapes_that_exist(tmp_path, capsys, monkeypatch):
    assert set(gpu_check.SHAPES) <= set(SHAPES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = selection.parse(gpu_check.operators(tmp_path, "llada-8b", 30)[4:], "")
    assert (options.device, list(options.shape), options.budget) == ("cuda", ["llada-8b"], 30)
    (tmp_path / "generate.py").touch()
    monkeypatch.setenv("LLADA", str(tmp_path))
    assert greedy._options(gpu_check.greedy(tmp_path)[4:]).device == "cuda"
    monkeypatch.undo()
    assert step._options(gpu_check.step(tmp_path)[3:]).steps == 16
    files = [argument for argument in gpu_check.tests() if argument.endswith(".py")]
    assert {f"tests/test_{name}.py" for name in ("sample_head", "noise", "graphs", "dit")} <= set(files)
    check = gpu_check.Check(tmp_path)
    timed = [row("ours", times={"cold": 4e-6}), row("theirs", "peer", times={"cold": 12e-6})]
    report = OperatorReport([], {}, rows=[(one, CEILINGS) for one in timed])
    report.save(tmp_path / "mdlm-small" / "operators.json")
    steps = StepRow("step", "unmask", "implementation", "cpu", "float32", 8, 24, 1000, 4, [Pass("all", 1000, 20_000)])
    steps = replace(steps, timing=Timing(3e-3, 3e-3, 3e-3, 1), roofline=1e-3)
    step_report.StepReport([], {}, rows=[(steps, CEILINGS)]).save(tmp_path / "step.json")
    ours = {"workload": "sotu-heavy", "peer": "unmask", "seconds": {"median": 0.5}, "ratio": None}
    peer = ours | {"peer": "mdlm-ddpm", "seconds": {"median": 4.0}, "ratio": 8.0}
    (tmp_path / "peers.json").write_text(json.dumps({"rows": [ours, peer]}))
    gpu_check.summary(check)
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert told[1][2:] == ["1.00", "0.00", "3.00"]
    assert told[3:5] == [["sotu-heavy", "unmask", "0.50"], ["sotu-heavy", "mdlm-ddpm", "4.00", "8.00"]]
    assert told[6][:5] == ["sample_head", "whole", "bundled", "R=2", "ours"]
    assert [float(word) for word in told[6][5:]] == [2.0, 4.0, 12.0]


def test_copies_of_other_samplers_are_handed_on(tmp_path, monkeypatch):
    for name in gpu_check.CHECKOUTS:
        monkeypatch.delenv(name, raising=False)
    plain = gpu_check.peers(tmp_path)
    monkeypatch.setenv("LLADA", str(tmp_path / "llada"))
    assert gpu_check.peers(tmp_path) == [*plain, f"--llada={tmp_path / 'llada'}"]
    assert {name.lower() for name in gpu_check.CHECKOUTS} == set(CHECKOUTS)
    assert plain[3] == "peers" and plain[plain.index("--out") + 1] == str(tmp_path / "peers.json")
